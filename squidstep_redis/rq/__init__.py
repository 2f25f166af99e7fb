"""Beside RQ: a job's steps take effect once, however often RQ runs the job.

`step` makes a job function one step; `steps` and `current_run` make several of it. The guide, tests/guide/rq.md in the
repository, says what happens when.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from inspect import BoundArguments, iscoroutinefunction, signature
from typing import Any, Final, Literal, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from squidstep_redis import (
    Call,
    InvalidArgumentError,
    PayloadError,
    Queued,
    StaleStepRunError,
    StepBusyError,
    StepRun,
    StepRunStore,
    current_claim,
)
from squidstep_redis.claims.rules import DEFAULT_LEASE, default_owner
from squidstep_redis.protocol.arguments import Seconds, Step, StepInputs
from squidstep_redis.rq.functions import RunIdOf, explain, result_of, run_id_of, stored_arguments
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.transport.blocking import BlockingTransport

OLDEST: Final = (2, 1)


def _check_version() -> None:
    try:
        installed = version("rq")
    except PackageNotFoundError as missing:
        raise ImportError("squidstep_redis.rq needs RQ: pip install 'squidstep_redis[rq]'") from missing
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < OLDEST:
        raise ImportError(
            f"squidstep_redis.rq needs RQ 2.1 or later, where a job can answer Retry; this is RQ {installed}"
        )


_check_version()

from redis import Redis  # noqa: E402 -- after the check, whose errors say more
from rq import Retry, get_current_job  # noqa: E402 -- likewise
from rq.job import Job  # noqa: E402 -- likewise
from rq.scheduler import RQScheduler  # noqa: E402 -- likewise

P = ParamSpec("P")
T = TypeVar("T")

OnBusy = Literal["reschedule", "raise", "wait"]

# RQ counts how often a job answered Retry and fails it beyond the maximum. A busy step is no failure.
MAX_RESCHEDULES: Final = 1_000_000
_SYNCHRONOUS: Final = "sync"  # the worker's name where RQ runs a job within enqueue(), and knows no Retry
_MAX_OWNER_BYTES: Final = 256

_log = logging.getLogger(__name__)


# The store: one per process, with a client of its own


class _JobTransport(BlockingTransport):
    """A transport whose calls are not interrupted by a job timeout."""

    def send(self, call: Call[T]) -> T:
        with defer_sigalrm():
            return super().send(call)

    def send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        with defer_sigalrm():
            return super().send_batch(calls)


class _JobStore(StepRunStore):
    """A store whose calls are not interrupted by a job timeout."""

    _transport_type = _JobTransport


# Where a connection leads to, and by which right: the rest of it RQ has set for its own needs.
_ADDRESS: Final = ("host", "port", "path", "db", "username", "password", "credential_provider")
_FAKEREDIS: Final = ("server", "version", "server_type", "lua_modules")  # what its connections are made with, too


class _Stores:
    """The stores of this process; a forked work-horse makes its own."""

    def __init__(self) -> None:
        self._connect: str | Callable[[], Any] | None = os.environ.get("SQUIDSTEP_REDIS_URL")
        self._settings: dict[str, Any] = {}
        self._forget()
        if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._own: StepRunStore | None = None
        self._beside: WeakKeyDictionary[Any, StepRunStore] = WeakKeyDictionary()

    def configure(self, connect: str | Callable[[], Any], settings: dict[str, Any]) -> None:
        self._connect, self._settings = connect, settings
        self._forget()

    def get(self, job: Job | None) -> StepRunStore:
        with defer_sigalrm():
            if self._connect is not None:
                self._own = self._own or self._make(self._connect)
                return self._own
            if job is None:
                raise InvalidArgumentError(
                    "store", "outside a job the server is not known: call squidstep_redis.rq.configure(url) first"
                )
            pool: Any = cast("Any", job.connection).connection_pool
            if pool not in self._beside:
                theirs: dict[str, Any] = pool.connection_kwargs
                kept = (*_ADDRESS, *_FAKEREDIS)
                ours = {name: theirs[name] for name in theirs if name in kept or name.startswith("ssl_")}
                if "connection_pool" in theirs:  # Sentinel's, which leads to another server after a failover
                    raise InvalidArgumentError(
                        "store", "RQ's connection comes from Sentinel: call configure(lambda: sentinel.master_for(…))"
                    )
                self._beside[pool] = _JobStore.from_url(
                    "redis://", connection_class=pool.connection_class, **{**ours, **self._settings}
                )
            return self._beside[pool]

    def _make(self, connect: str | Callable[[], Any]) -> StepRunStore:
        if isinstance(connect, str):
            return _JobStore.from_url(connect, **self._settings)
        return _JobStore(connect(), **self._settings)


_stores: Final = _Stores()


def configure(connect: str | Callable[[], Redis], **settings: Any) -> None:
    """Says where the steps are kept; call it where the job functions are defined. Nothing is connected yet.

    Without it: the URL in SQUIDSTEP_REDIS_URL, else RQ's own server, with a client of this library's own.

    Args:
        connect: a URL; or what makes a client, called once in each process, after RQ has forked it.
        settings: `prefix`, `codec`, `run_ttl`, `timeout`, `wait_replicas`, … as for `StepRunStore`.
    """
    _stores.configure(connect, settings)


def store() -> StepRunStore:
    """The store of this process: to read what a job's steps gave, or to schedule some.

    Raises:
        InvalidArgumentError: outside a job, without `configure` or SQUIDSTEP_REDIS_URL.
    """
    return _stores.get(get_current_job())


# Runs and steps

# Set within the `try` whose end sets back what was there before: a time-out that struck between the setting and the
# keeping of a token would leave it to the next job of the process.
_run: ContextVar[Run | None] = ContextVar("squidstep_rq_run", default=None)


class Run:
    """One run, as the job that works on it sees it.

    Attributes:
        id: the run's id; None outside a job, where nothing is kept and functions are just called.
        job: that works on it; None outside. A thread of the job's own, in which RQ knows of none, may use the run, too.
    """

    def __init__(
        self,
        id: str | None,
        job: Job | None,
        lease: Seconds | None,
        max_attempts: int | None,
        on_busy: Literal["raise", "wait"],
    ) -> None:
        self.id = id
        self.job = job
        self._lease = lease
        self._max_attempts = max_attempts
        self._on_busy: Literal["raise", "wait"] = on_busy

    def call(self, step: Step, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `fn(*args, **kwargs)` as a step: once across all deliveries.

        Round trips as for `StepRunStore.run_step`.

        Args:
            step: the step's name: another for each call, or it is the same step, and answers the same.
            fn: does the work, also as a coroutine function. What it answers is kept as `{"result": …}`.
            args: kept as the step's input, by the names of `fn`'s parameters; so must be what a payload can hold.
            kwargs: likewise.

        Returns:
            What `fn` answered, as it was kept: a tuple comes back a list.

        Raises:
            As `StepRunStore.run_step`.
        """
        if self.id is None:
            return fn(*args, **kwargs)
        bound = signature(fn).bind(*args, **kwargs)
        return _execute(self, step, fn, bound, self._lease, self._max_attempts, self._on_busy)

    def __repr__(self) -> str:
        return f"<Run {self.id!r}>"


def current_run(
    run_id: str | None = None,
    *,
    lease: Seconds | None = DEFAULT_LEASE,
    max_attempts: int | None = None,
    on_busy: Literal["raise", "wait"] = "raise",
) -> Run:
    """The run of the job that is at work: for several steps within one job. Nothing is sent.

    Args:
        run_id: another run's id; None: that of `steps`, else the job's id (with what is left of its `Repeat`).
        lease: of each step, see `StepRunStore.run_step`.
        max_attempts: likewise.
        on_busy: likewise. To have the job rescheduled when a step is busy, decorate it with `steps`.
    """
    run, job = _run.get(), get_current_job()
    if run_id is None and run is not None and (job is None or run.job == job):  # else within an enqueue() of that job
        return run
    if run_id is None and job is not None:
        run_id = default_run_id(job)
    return Run(run_id, job, lease, max_attempts, on_busy)


def default_run_id(job: Job) -> str:
    """The run id of a job that names none: its own id, and under `Repeat` how many repeats are left.

    Each repeat is a run of its own; RQ tells them apart by nothing else.
    """
    left = getattr(job, "repeats_left", None)
    return job.id if left is None else f"{job.id}#{left}"


def step(
    name: Step,
    *,
    run_id: RunIdOf | None = None,
    lease: Seconds | None = DEFAULT_LEASE,
    max_attempts: int | None = None,
    on_busy: OnBusy = "reschedule",
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function a step: however often RQ runs the job, the function takes effect once.

    A redelivery of a completed step answers the stored result, as the job's. Outside a job the function runs as if it
    were not decorated, unless it has a `run_id`.

    Args:
        name: the step's name.
        run_id: of the function's arguments, such as "order-{order_id}", or a function of them; None: the job's, see
            `current_run`.
        lease: seconds, see `StepRunStore.run_step`; a heartbeat extends it.
        max_attempts: claims to grant in all.
        on_busy: while another worker holds the step: "reschedule" has RQ run the job again after the rest of the
            lease, without spending the job's own retries; it needs a worker with a scheduler. "raise" StepBusyError,
            which is also what happens where RQ cannot reschedule; or "wait".

    Raises:
        InvalidArgumentError: `run_id` names what is no parameter of the function.
    """
    _check_on_busy(on_busy)

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        parameters = signature(fn)
        id_of = run_id_of(run_id, parameters)

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
            bound = parameters.bind(*args, **kwargs)
            run = current_run(id_of(bound) if id_of is not None else None)
            if run.id is None:
                return fn(*args, **kwargs)
            return _execute(run, name, fn, bound, lease, max_attempts, "wait" if on_busy == "wait" else "raise")

        return _rescheduling(fn, call, lease, on_busy)

    return decorate


def steps(
    *,
    run_id: RunIdOf | None = None,
    lease: Seconds | None = DEFAULT_LEASE,
    max_attempts: int | None = None,
    on_busy: OnBusy = "reschedule",
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a job function a run of several steps, each of them a `current_run().call(…)` or a function with `step`.

    The function itself runs at each delivery; its completed steps answer what they gave.

    Args:
        run_id: as for `step`.
        lease: of each `call`.
        max_attempts: likewise.
        on_busy: as for `step`, of whichever step is busy.

    Raises:
        InvalidArgumentError: `run_id` names what is no parameter of the function.
    """
    _check_on_busy(on_busy)

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        parameters = signature(fn)
        id_of = run_id_of(run_id, parameters)

        def open_run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
            id = id_of(parameters.bind(*args, **kwargs)) if id_of is not None else None
            waits = "wait" if on_busy == "wait" else "raise"
            return current_run(id, lease=lease, max_attempts=max_attempts, on_busy=waits)

        async def call_async(run: Run, args: Any, kwargs: Any) -> Any:
            before = _run.get()
            try:
                _run.set(run)
                return await cast("Any", fn)(*args, **kwargs)
            finally:
                _run.set(before)

        def call(args: Any, kwargs: Any) -> T:
            run = open_run(args, kwargs)
            if iscoroutinefunction(fn):
                return cast("T", call_async(run, args, kwargs))
            before = _run.get()
            try:
                _run.set(run)
                return cast("Any", fn)(*args, **kwargs)
            finally:
                _run.set(before)

        return _rescheduling(fn, call, lease, on_busy)

    return decorate


def queue_completion(pipeline: Any, result: Any, *, schedule: StepInputs | None = None) -> Queued[StepRun]:
    """Completes the step at hand within a pipeline of your own: an outbox.

    Enqueue the next job on the same transaction, first, and both or neither take effect: see the guide.

    Args:
        pipeline: a redis-py transaction on the server that keeps the steps.
        result: what the step's function is to answer.
        schedule: as for `complete_step`.

    Returns:
        What reads the reply: `queued.result(pipeline.execute())`.

    Raises:
        InvalidArgumentError: no step is at hand; PayloadError: the result cannot be kept.
    """
    claim = current_claim()
    if claim is None:
        raise InvalidArgumentError("claim", "queue_completion is called by the function of a step, while it runs")
    return claim.queue_completion(pipeline, {"result": result}, schedule=schedule)


def release_killed_work_horse(job: Job, pid: int | None, status: int | None, usage: object) -> None:
    """For `Worker(work_horse_killed_handler=release_killed_work_horse)`: frees a killed work-horse's claims.

    Its claims, and only those, can be taken over at once, instead of when their leases end. Two or three round trips
    per server. It raises nothing: what goes wrong is logged, and the leases end by themselves.

    Args:
        job: as RQ calls it.
        pid: of the work-horse.
        status: not used, like the next.
        usage: not used.
    """
    del status, usage
    try:
        if pid:
            store = _stores.get(job)
            claims = store.live_claims(1_000, owner=owner(job, pid))
            for result in store.batch([store.calls.expire_claim(claim) for claim in claims]):
                if isinstance(result, Exception) and not isinstance(result, StaleStepRunError):
                    raise result
    except Exception as error:  # noqa: BLE001 -- RQ's worker would end with it, over what the leases mend anyway
        _log.warning("the claims of work-horse %s, job %s, could not be freed: %s", pid, job.id, error)


def owner(job: Job | None, pid: int | None = None) -> str:
    """Who claims: `host:pid` and the job, for a pid comes again."""
    text = default_owner() if pid is None else f"{default_owner().rpartition(':')[0]}:{pid}"
    if job is not None:
        text = re.sub(r"[\x00-\x1f\x7f]", "?", f"{text} {job.id}")
    return text.encode(errors="replace")[:_MAX_OWNER_BYTES].decode(errors="ignore")


# How a function becomes a step


def _execute(
    run: Run,
    step: Step,
    fn: Callable[..., T],
    bound: BoundArguments,
    lease: Seconds | None,
    max_attempts: int | None,
    on_busy: Literal["raise", "wait"],
) -> T:
    store, run_id, input = _stores.get(run.job), cast("str", run.id), dict(bound.arguments)
    settings: Any = {"lease": lease, "max_attempts": max_attempts, "on_busy": on_busy, "owner": owner(run.job)}

    def work(stored: dict[str, Any]) -> dict[str, Any]:
        return {"result": result_of(fn, stored_arguments(bound, stored))}

    async def work_async() -> Any:
        # RQ gives a coroutine a loop, and a process, of its own: the blocking store holds up nobody else.
        while True:
            claim = store.claim_step(run_id, step, input, **settings)
            try:
                with claim:
                    if claim.decision == "execute":
                        arguments = stored_arguments(bound, claim.input)
                        result = await cast("Any", fn)(*arguments.args, **arguments.kwargs)
                        if not claim.ended:
                            claim.complete({"result": result})
                return _result(claim.result())
            except StaleStepRunError as error:
                claim.raise_unless_running(error)
            except PayloadError as error:
                explain(error)
                raise

    if iscoroutinefunction(fn):
        return cast("T", work_async())
    try:
        return _result(store.run_step(run_id, step, work, input, **settings))
    except PayloadError as error:
        explain(error)
        raise


def _result(output: dict[str, Any]) -> Any:
    """What the function answered; or the whole output, of a step that was completed in another way."""
    return output["result"] if output.keys() == {"result"} else output


# What becomes of a job whose step is busy

_inside: ContextVar[bool] = ContextVar("squidstep_rq_inside", default=False)


def _check_on_busy(on_busy: object) -> None:
    if on_busy not in ("reschedule", "raise", "wait"):
        raise InvalidArgumentError("on_busy", f"must be 'reschedule', 'raise' or 'wait', not {on_busy!r}")


def _rescheduling(
    fn: Callable[P, T], call: Callable[[Any, Any], T], lease: Seconds | None, on_busy: OnBusy
) -> Callable[P, T]:
    """The decorated function: as the function of a job it answers Retry when a step is busy."""

    def busy(error: StepBusyError, outermost: bool) -> T:
        job = get_current_job()
        if on_busy != "reschedule" or not outermost or job is None or not _is_function_of(job, decorated):
            raise error
        if job.worker_name == _SYNCHRONOUS:
            error.add_note("The job was not rescheduled: RQ runs it within enqueue(), and knows no Retry there.")
            raise error
        if not _has_scheduler(job):
            error.add_note("The job was not rescheduled: no worker of its queue has a scheduler (--with-scheduler).")
            raise error
        return cast("T", Retry(max=MAX_RESCHEDULES, interval=_interval(error, lease)))

    @wraps(fn)
    def sync(*args: P.args, **kwargs: P.kwargs) -> T:
        outermost = not _inside.get()
        try:
            _inside.set(True)
            return call(args, kwargs)
        except StepBusyError as error:
            return busy(error, outermost)
        finally:
            _inside.set(not outermost)

    @wraps(fn)
    async def coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
        outermost = not _inside.get()
        try:
            _inside.set(True)
            return await cast("Any", call(args, kwargs))
        except StepBusyError as error:
            return busy(error, outermost)
        finally:
            _inside.set(not outermost)

    decorated = cast("Callable[P, T]", coroutine) if iscoroutinefunction(fn) else sync
    return decorated


def _is_function_of(job: Job, decorated: object) -> bool:
    """Whether what the function answers is the job's answer."""
    function: object = job.func
    while function is not None:
        function = getattr(function, "__func__", function)
        if function is decorated:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _has_scheduler(job: Job) -> bool:
    connection: Any = job.connection
    with defer_sigalrm():
        return bool(connection.exists(RQScheduler.get_locking_key(job.origin)))


def _interval(error: StepBusyError, lease: Seconds | None) -> int:
    """Seconds, whole ones for RQ: the rest of the lease, and up to a tenth or a second more."""
    rest = error.retry_in
    if rest is None:
        rest = lease if isinstance(lease, float | int) else DEFAULT_LEASE if lease is None else lease.total_seconds()
    seconds = max(1, math.ceil(rest))
    return seconds + random.randint(0, max(1, seconds // 10))  # noqa: S311 -- nothing secret
