"""The blocking store: the only place where it waits for the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import redis
from redis import RedisError
from redis.backoff import NoBackoff
from redis.exceptions import AskError, NoScriptError, ResponseError
from redis.retry import Retry

from squidstep_redis import wire
from squidstep_redis.arguments import RunId, Seconds, Step, StepInputs
from squidstep_redis.base import BaseStore, documented
from squidstep_redis.calls import Calls
from squidstep_redis.claims import DEFAULT_LEASE, BaseClaim, OnBusy
from squidstep_redis.connections import Lender
from squidstep_redis.doctor import Diagnosis, examine
from squidstep_redis.errors import InvalidArgumentError, SquidstepError, StaleStepRunError, described
from squidstep_redis.heartbeats import heartbeat_of
from squidstep_redis.model import StepRun
from squidstep_redis.sending import FAILURES, UNANSWERED, Sending, Unsettled, outcome, outcomes
from squidstep_redis.signals import AlarmHeldBack
from squidstep_redis.wire import OPTIONS, Call, Command, Doze, Exchange, Plan

P = ParamSpec("P")
T = TypeVar("T")


def _operation(
    make: Callable[Concatenate[Calls, P], Call[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that makes a call and sends it."""

    def operation(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(make(self.calls, *args, **kwargs))

    return documented(operation, make, "StepRunStore")


def _exchange(
    make: Callable[Concatenate[Calls, P], Exchange[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that carries an exchange through."""

    def carried(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        exchange = make(self.calls, *args, **kwargs)
        try:
            calls = next(exchange)
            while True:
                calls = exchange.send(self._send_all(calls))  # pyright: ignore[reportPrivateUsage]: of this module
        except StopIteration as end:
            return end.value

    return documented(carried, make, "StepRunStore")


def _planned(
    make: Callable[Concatenate[Calls, P], Plan[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that carries a plan out."""

    def planned(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return _carry_out(self, make(self.calls, *args, **kwargs))

    return documented(planned, make, "StepRunStore")


class StepRunStore(BaseStore[redis.Redis | redis.RedisCluster]):
    """Decides which delivery of a step executes, and keeps what came of it: the store, blocking."""

    _client_types = (redis.Redis, redis.RedisCluster)
    _lender_type = Lender

    schedule_step = _operation(Calls.schedule_step)
    schedule_steps = _operation(Calls.schedule_steps)
    begin_step = _operation(Calls.begin_step)
    complete_step = _operation(Calls.complete_step)
    advance_step = _operation(Calls.advance_step)
    fail_step = _operation(Calls.fail_step)
    extend_claim = _operation(Calls.extend_claim)
    expire_claim = _operation(Calls.expire_claim)
    release_step = _operation(Calls.release_step)
    retry_step = _operation(Calls.retry_step)
    delete_pending_steps = _operation(Calls.delete_pending_steps)

    get_step_run = _operation(Calls.get_step_run)
    get_run = _operation(Calls.get_run)
    attempts = _operation(Calls.attempts)
    completed_steps = _operation(Calls.completed_steps)
    completed_outputs = _operation(Calls.completed_outputs)
    step_statuses = _operation(Calls.step_statuses)
    wait_for_step = _planned(Calls.wait_for_step)

    expire_run = _operation(Calls.expire_run)
    delete_run = _operation(Calls.delete_run)
    export_run = _operation(Calls.export_run)
    import_run = _operation(Calls.import_run)

    batch = _exchange(Calls.batch)
    lapsed_claims = _exchange(Calls.lapsed_claims)
    live_claims = _exchange(Calls.live_claims)
    failed_steps = _exchange(Calls.failed_steps)
    count_claims = _exchange(Calls.count_claims)
    retry_run = _exchange(Calls.retry_run)
    runs = _planned(Calls.runs)
    purge = _planned(Calls.purge)

    def run_step(
        self,
        run_id: RunId,
        step: Step,
        fn: Callable[[dict[str, Any]], Mapping[str, Any]],
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = DEFAULT_LEASE,
        max_attempts: int | None = None,
        on_busy: OnBusy = "raise",
        owner: str | None = None,
    ) -> dict[str, Any]:
        """Executes a step once across all deliveries, and answers its stored output ever after.

        Two round trips if it executes, one if it skips. Meanwhile a heartbeat extends the leases of all claims of
        this process, a third of the lease after they were last extended: one round trip for all of one client's.

        An exception of `fn` is recorded with `fail_step` and raised again. If the claim is lost to a takeover,
        `current_claim().lost` is set, the late result is discarded, and the winner's is answered in its place. A
        result that cannot get through is sent again for as long as the lease, but for at most a minute.

        Args:
            run_id: as for `begin_step`.
            step: likewise.
            fn: given the stored input, answers the output: does the work. `current_claim()` is its claim.
            input: kept, unless the step was scheduled with its own.
            lease: seconds after which another worker may take over from one that is dead or hangs; None: never.
            max_attempts: claims to grant in all.
            on_busy: what to do while another worker holds the step: "raise", or "wait" until it is completed or can
                be claimed (asking again, at most once a second).
            owner: who claims, for operators; None: `host:pid`.

        Returns:
            The stored output.

        Raises:
            StepBusyError: another worker holds the step, or has taken it over.
            StepExhaustedError: `max_attempts` are used up.
            StaleStepRunError: the claim was lost, and nobody has completed the step or is at it.
            PayloadError: what `fn` answered cannot be kept; the step is recorded as failed.
            InvalidArgumentError: refused before anything was sent.
            ServerError: the server could not be asked, or not be told of the result.
        """
        if not callable(fn):
            raise InvalidArgumentError("fn", f"must be callable, not {described(fn)}")
        while True:
            claim = self.claim_step(
                run_id, step, input, lease=lease, max_attempts=max_attempts, on_busy=on_busy, owner=owner
            )
            try:
                with claim:
                    if claim.decision == "execute":
                        output = fn(claim.input)
                        if not claim.ended:
                            claim.complete(output)
                return claim.result()
            except StaleStepRunError as error:
                claim.may_ask_again(error)

    def claim_step(
        self,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = DEFAULT_LEASE,
        max_attempts: int | None = None,
        on_busy: OnBusy = "raise",
        owner: str | None = None,
    ) -> Claim:
        """Makes a `with` block that holds the claim on a step: `run_step` for code that is not one function.

        Nothing is sent before the block is entered. The block looks at `claim.decision`: on "execute" it does the
        work and calls `claim.complete(output)`; on "skip" the step was completed before, see `claim.output`. An
        exception that leaves the block is recorded with `fail_step`.

        Args:
            run_id: as for `run_step`, like all the others.
            step: see there.
            input: see there.
            lease: see there.
            max_attempts: see there.
            on_busy: see there.
            owner: see there.

        Raises:
            As `run_step`, from entering the block.
        """
        return Claim(self, run_id, step, input, lease, max_attempts, on_busy, owner)

    def doctor(self, *, lease: Seconds | None = None, job_timeout: Seconds | None = None) -> Diagnosis:
        """Examines the server and the client: can the promises be kept here, and what limits them?

        A scratch run of its own is taken through every transition, and deleted; on a cluster, one on each primary.
        Twenty round trips per server. What goes wrong is a finding, not an exception.

        Args:
            lease: seconds of the leases that you give `begin_step` and that nothing extends, to be examined too.
            job_timeout: seconds that the work under such a lease may take.

        Raises:
            InvalidArgumentError: refused before anything was sent.
        """
        return _carry_out(self, examine(self.calls, self._client_facts(lease, job_timeout)))

    def close(self) -> None:
        """Closes the client, if `from_url` made it."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @classmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> redis.Redis:
        client: Any = redis.Redis
        return client.from_url(url, **{"retry": Retry(NoBackoff(), 0), **options})

    def send(self, call: Call[T]) -> T:
        """Sends one call made by `calls`; what the operation's own method does.

        The same call can be sent again, by any store of the same prefix: it takes effect once.
        """
        if not self._watch:
            return self._send(call)
        began = time.monotonic()
        try:
            result = self._send(call)
        except Exception as error:
            self._watch.tell(call, error, time.monotonic() - began)
            raise
        self._watch.tell(call, result, time.monotonic() - began)
        return result

    def _send(self, call: Call[T]) -> T:
        began = time.monotonic()
        try:
            return self._send_once(call)
        except FAILURES as error:
            return self._insist(lambda: self._send_once(call), Sending(call, began, self._patience), error)

    def _send_once(self, call: Call[T]) -> T:
        if self._durability is not None and call.script.is_transition:
            return self._send_and_wait(call)
        return call.answer(self._execute(call))

    def _execute(self, call: Call[Any]) -> Any:
        if self._lender.lends():
            (reply,) = self._lender.send(call.evalsha())
            if isinstance(reply, NoScriptError):
                (reply,) = self._lender.send(call.eval())
            if isinstance(reply, ResponseError):
                raise reply
            return reply
        try:
            return self._untyped_client.execute_command(*call.evalsha(), **OPTIONS)
        except NoScriptError:
            return self._untyped_client.execute_command(*call.eval(), **OPTIONS)

    def _send_and_wait(self, call: Call[T]) -> T:
        (reply,) = self._send_to(self._node(call), [call], load_scripts=False)
        if isinstance(reply, NoScriptError):
            (reply,) = self._send_to(self._node(call), [call])
        if isinstance(reply, AskError) and isinstance(self.client, redis.RedisCluster):
            # The slot is elsewhere, or on its way. redis-py knows to follow it, but not to wait on that connection.
            result = call.answer(self._execute(call))
            (reply,) = self._send_to(self._node(call), [call])
            if isinstance(reply, AskError):
                raise wire.not_replicated(call, result, "its slot is moving to another node")
        return wire.read(call, reply)

    def _insist(self, attempt: Callable[[], T], sending: Sending, error: Exception) -> T:
        """Tries again until it succeeds, or `sending` raises what has become of it."""
        while True:
            time.sleep(sending.failed(error))
            try:
                return attempt()
            except FAILURES as failure:
                error = failure

    def _send_all(self, calls: Sequence[Call[Any]]) -> list[Any]:
        if not self._watch:
            return self._send_batch(calls)
        began = time.monotonic()
        try:
            results = self._send_batch(calls)
        except Exception as error:
            self._watch.tell_all(calls, [error] * len(calls), time.monotonic() - began)
            raise
        self._watch.tell_all(calls, results, time.monotonic() - began)
        return results

    def _send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        sending = Sending(None, time.monotonic(), self._patience)
        try:
            results = self._send_together(calls, sending)
        except FAILURES as error:
            results = self._insist(lambda: self._send_together(calls, sending), sending, error)
        return [
            self._resend(call, result.error, sending) if isinstance(result, Unsettled) else result
            for call, result in zip(calls, results, strict=True)
        ]

    def _send_together(self, calls: Sequence[Call[Any]], sending: Sending) -> list[Any]:
        if self._durability is None and self._lender.lends():
            commands = wire.commands(calls)
            read = outcomes(calls, len(commands) - len(calls), sending.may_have_run)
            return self._lender.send(*commands, read=read)[-len(calls) :]  # each is read while the next is made
        is_one = isinstance(self.client, redis.Redis)
        replies = self._send_to(self.client, calls) if is_one else self._send_to_nodes(calls)
        return [outcome(call, reply, sending.may_have_run) for call, reply in zip(calls, replies, strict=True)]

    def _send_to(self, client: Any, calls: Sequence[Call[Any]], *, load_scripts: bool = True) -> list[Any]:
        commands = wire.commands(calls, self._durability, load_scripts=load_scripts)
        lender = self._lender if client is self.client else Lender(client)
        if lender.lends():
            return wire.replies_to(calls, lender.send(*commands), self._durability)
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command, **OPTIONS)
        return wire.replies_to(calls, pipeline.execute(raise_on_error=False), self._durability)

    def _send_to_nodes(self, calls: Sequence[Call[Any]]) -> list[Any]:
        replies: list[Any] = [None] * len(calls)
        nodes: dict[int, tuple[Any, list[int]]] = {}
        for index, call in enumerate(calls):
            node = self._node(call)
            nodes.setdefault(id(node), (node, []))[1].append(index)
        for node, indexes in nodes.values():
            try:
                answered = self._send_to(node, [calls[index] for index in indexes])
            except UNANSWERED as error:
                answered = [error] * len(indexes)
            for index, reply in zip(indexes, answered, strict=True):
                replies[index] = reply
        return replies

    def _node(self, call: Call[Any]) -> Any:
        """The client of the server that has the call's slot."""
        if isinstance(self.client, redis.Redis):
            return self.client
        cluster: Any = self.client
        return cluster.get_redis_connection(cluster.nodes_manager.get_node_from_slot(cluster.keyslot(call.keys[0])))

    def _resend(self, call: Call[Any], error: Exception, batch: Sending) -> Any:
        sending = Sending(call, batch.began, self._patience, may_have_run=batch.may_have_run)
        try:
            if isinstance(error, (NoScriptError, AskError)):  # it has not run, and a single call finds the way
                try:
                    return self._send_once(call)
                except FAILURES as failure:
                    error = failure
            return self._insist(lambda: self._send_once(call), sending, error)
        except Exception as failure:  # noqa: BLE001 -- each call of a batch answers for itself
            return failure


def _carry_out(store: StepRunStore, plan: Plan[T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Does what a plan says."""
    try:
        wanted = next(plan)
        while True:
            answer: Any = None
            try:
                if isinstance(wanted, Call):
                    answer = store.send(wanted)
                elif isinstance(wanted, list):
                    answer = _ask(store.client, wanted)
                elif isinstance(wanted, Doze):
                    _doze(store, wanted)
                elif isinstance(wanted, tuple):
                    answer = store._send_all(wanted)  # pyright: ignore[reportPrivateUsage]: of this module
                else:
                    sleep(wanted)
            except Exception as error:  # noqa: BLE001 -- the plan knows which errors to bear
                wanted = plan.throw(error)
            else:
                wanted = plan.send(answer)
    except StopIteration as end:
        return end.value


def _doze(store: StepRunStore, doze: Doze) -> None:
    longest = store._longest_read / 2  # pyright: ignore[reportPrivateUsage]: of this module
    client: Any = store.client
    try:
        client.execute_command(*doze.command(longest))
    except RedisError:  # the next look will tell
        time.sleep(min(doze.seconds, 0.1))


def _ask(client: Any, commands: list[Command]) -> dict[str, list[Any]]:
    """Sends commands to every server: by server, their replies or errors."""
    if isinstance(client, redis.RedisCluster):
        cluster: Any = client
        servers = {node.name: cluster.get_redis_connection(node) for node in cluster.get_primaries()}
    else:
        servers = {"": client}
    return {name: list(_answers(server, commands)) for name, server in servers.items()}


def _answers(server: Any, commands: list[Command]) -> Iterator[Any]:
    unanswered: Exception | None = None
    for command in commands:
        try:
            yield unanswered or server.execute_command(*command)
        except RedisError as error:
            yield error
            if isinstance(error, UNANSWERED):
                unanswered = error  # nor will it answer the rest


class Claim(BaseClaim[threading.Event]):
    """A step to be executed by this delivery or skipped: the `with` block that `claim_step` makes."""

    store: StepRunStore

    def __init__(
        self,
        store: StepRunStore,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        lease: Seconds | None,
        max_attempts: int | None,
        on_busy: OnBusy,
        owner: str | None,
    ) -> None:
        super().__init__(store.calls, run_id, step, input, lease, max_attempts, on_busy, owner, threading.Event())
        self.store = store

    def __enter__(self) -> Self:
        try:
            with AlarmHeldBack() as alarm:
                _carry_out(self.store, self._claiming(), alarm.sleep)
                self._enter()
                if self._state == "held" and self._lease is not None:
                    heartbeat_of(self.store.client).add(self)
        except SquidstepError:
            raise
        except BaseException:  # a signal handler raised: the work has not begun
            with AlarmHeldBack(), suppress(SquidstepError):
                self._stop()
                _carry_out(self.store, self._abandoning())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with AlarmHeldBack():
            try:
                missing = _carry_out(self.store, self._leaving(error))
            finally:
                self._stop()
        if missing is not None:
            raise missing

    def complete(self, output: Mapping[str, Any], *, schedule: StepInputs | None = None) -> StepRun:
        """Ends the claim with an output, see `complete_step`; one round trip, insistent as `run_step`.

        Returns:
            The completed step run: the winner's, if the claim was lost to it.

        Raises:
            StaleStepRunError: the claim was lost, and the step is not completed.
            StepRunNotFoundError: the run was deleted.
            PayloadError: the output cannot be kept; the claim is still held.
            ServerError: the server could not be told in time; the claim ends with its lease.
        """
        with AlarmHeldBack():
            return _carry_out(self.store, self._completing(output, schedule))

    def fail(self, error: Mapping[str, Any] | BaseException) -> StepRun:
        """Ends the claim with an error, see `fail_step`; round trips and errors as for `complete`."""
        with AlarmHeldBack():
            return _carry_out(self.store, self._failing(error))

    def release(self) -> StepRun:
        """Gives the claim back before the work took effect, see `release_step`; otherwise as `complete`.

        For a worker that is told to stop (SIGTERM): the attempt does not count, and the step can be claimed at once.
        """
        with AlarmHeldBack():
            return _carry_out(self.store, self._releasing())

    def _stop(self) -> None:
        if self._lease is not None:
            heartbeat_of(self.store.client).discard(self)
        self._exit()
