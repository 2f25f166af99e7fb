"""The blocking store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import iscoroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from squidstep_redis.claims.claim import Claim
from squidstep_redis.claims.heartbeat import end_heartbeat
from squidstep_redis.claims.request import (
    ClaimSettings,
    FunctionSettings,
    claim_request,
    with_claim_settings,
    with_function_settings,
)
from squidstep_redis.doctor.examine import Diagnosis, examine
from squidstep_redis.errors import InvalidArgumentError, StaleStepRunError, described
from squidstep_redis.facade import BaseStore, as_method, named_first
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import LabelsOf, RunId, RunIdOf, Seconds, Step
from squidstep_redis.protocol.call import Call, check_call
from squidstep_redis.protocol.workflow import Workflow
from squidstep_redis.transport.blocking import BlockingTransport, run_workflow

if TYPE_CHECKING:
    from squidstep_redis.functions.runs import Run

P = ParamSpec("P")
T = TypeVar("T")


class StepRunStore(BaseStore[redis.Redis | redis.RedisCluster, BlockingTransport]):
    """Decides which delivery of a step executes, and stores its input, output and error: the blocking store."""

    _client_types = (redis.Redis, redis.RedisCluster)
    _transport_type = BlockingTransport

    @staticmethod
    def _call(operation: Callable[Concatenate[Calls, P], Call[T]]) -> Callable[Concatenate[StepRunStore, P], T]:
        """Returns the method that sends an operation's call."""

        def method(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
            return self._transport.send(operation(self.calls, *args, **kwargs))

        return as_method(method, operation, "StepRunStore")

    @staticmethod
    def _workflow(operation: Callable[Concatenate[Calls, P], Workflow[T]]) -> Callable[Concatenate[StepRunStore, P], T]:
        """Returns the method that runs an operation's workflow."""

        def method(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
            return run_workflow(self._transport, operation(self.calls, *args, **kwargs))

        return as_method(method, operation, "StepRunStore")

    schedule_step = _call(Calls.schedule_step)
    schedule_steps = _call(Calls.schedule_steps)
    delete_pending_steps = _call(Calls.delete_pending_steps)

    begin_step = _call(Calls.begin_step)
    begin_steps = _call(Calls.begin_steps)
    complete_step = _call(Calls.complete_step)
    complete_steps = _workflow(Calls.complete_steps)
    advance_step = _call(Calls.advance_step)
    fail_step = _call(Calls.fail_step)
    checkpoint_step = _call(Calls.checkpoint_step)
    extend_claim = _call(Calls.extend_claim)
    expire_claim = _call(Calls.expire_claim)
    release_step = _call(Calls.release_step)

    get_step_run = _call(Calls.get_step_run)
    get_run = _call(Calls.get_run)
    scan_steps = _call(Calls.scan_steps)
    attempts = _call(Calls.attempts)
    completed_steps = _call(Calls.completed_steps)
    completed_outputs = _call(Calls.completed_outputs)
    step_statuses = _call(Calls.step_statuses)
    wait_for_step = _workflow(Calls.wait_for_step)

    explain_step = _workflow(Calls.explain_step)
    explain_run = _workflow(Calls.explain_run)

    lapsed_claims = _workflow(Calls.lapsed_claims)
    live_claims = _workflow(Calls.live_claims)
    failed_steps = _workflow(Calls.failed_steps)
    count_claims = _workflow(Calls.count_claims)
    count_failed = _workflow(Calls.count_failed)
    overview = _workflow(Calls.overview)

    expire_run = _call(Calls.expire_run)
    cancel_run = _call(Calls.cancel_run)
    resume_run = _call(Calls.resume_run)
    delete_run = _call(Calls.delete_run)
    summarize_run = _workflow(Calls.summarize_run)
    runs = _workflow(Calls.runs)
    count_runs = _workflow(Calls.count_runs)
    purge = _workflow(Calls.purge)

    retry_step = _call(Calls.retry_step)
    retry_run = _workflow(Calls.retry_run)
    export_run = _call(Calls.export_run)
    import_run = _call(Calls.import_run)
    fork_run = _workflow(Calls.fork_run)

    batch = _workflow(Calls.batch)

    @classmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> redis.Redis:
        client: Any = redis.Redis
        return client.from_url(url, **{"retry": Retry(NoBackoff(), 0), **options})

    def send(self, call: Call[T]) -> T:
        """Sends one call made by `calls`, as the operation's own method does.

        The same call can be re-sent, by any store with the same prefix: it takes effect once.

        Args:
            call: made by `store.calls`, or `OutcomeUnknownError.call`.

        Returns:
            What the operation's own method returns.

        Raises:
            SquidstepError: what the operation's own method raises.
            InvalidArgumentError: it is not a Call.
        """
        return self._transport.send(call if type(call) is Call else check_call("call", call))

    @with_claim_settings
    def run_step(
        self,
        run_id: RunId,
        step: Step,
        fn: Callable[[dict[str, Any]], Mapping[str, Any] | None],
        input: Mapping[str, Any],
        **settings: Unpack[ClaimSettings],
    ) -> dict[str, Any]:
        """Executes a step once across all deliveries, and returns its stored output from then on.

        Two round trips if it executes, one if it skips. Meanwhile, a heartbeat extends the leases of all claims of this
        process when a third of the lease has passed: one round trip for all claims of one store.

        An exception of `fn` is recorded with `fail_step` and re-raised. PermanentError, and the types in `permanent`,
        make the step fail permanently; RetryLater, and `backoff`, delay the next attempt. If the claim is lost to a
        takeover, `current_claim().lost` is set, the late result is discarded, and the winner's result is returned. A
        result, or a failure, that cannot be sent is retried for the duration of the lease, at most a minute. If the
        call is interrupted (a signal, a cancellation), it waits at most a second for this. A claim whose begin got no
        reply is released once the server replies again.

        Args:
            run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
            step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
                str, else its name).
            fn: does the work: receives the stored input and returns the output, a dict; None stands for {}.
                `current_claim()` is its claim.
            input: the step's input, a dict. It is stored unless the step was scheduled with its own.
            **settings: how the step is claimed, and what a failure means: see `ClaimSettings`.

        Returns:
            The stored output.

        Raises:
            InputMismatchError: the step has a different fingerprint; nothing was written.
            StepBusyError: another worker holds the step, or took it over.
            StepDelayedError: the step has failed and may not be retried yet.
            RunCancelledError: the run is cancelled.
            StepFailedError: the step has failed permanently.
            StepExhaustedError: `max_attempts` is reached.
            StaleStepRunError: the claim was lost, and no worker has completed the step or is running it.
            PayloadError: the output of `fn` cannot be stored. The step has failed permanently, because the work may
                have taken effect.
            InvalidArgumentError: an argument was rejected before anything was sent; or, on a blocking store, `fn`
                returned a coroutine: the step has failed, and may be executed again.
            ServerError: the server or the connection failed, at the beginning or when the result was sent.
        """
        if not callable(fn):
            raise InvalidArgumentError("fn", f"must be callable, not {described(fn)}")
        while True:
            claim = self.claim_step(run_id, step, input, **settings)
            try:
                with claim:
                    if claim.decision == "execute":
                        output = fn(claim.input)
                        if iscoroutine(output):  # it has not done the work, so the step may be executed again
                            output.close()
                            raise InvalidArgumentError("fn", f"{fn!r} returned a coroutine: use an AsyncStepRunStore")
                        if not claim.ended:
                            claim.complete({} if output is None else output)
                return claim.result()
            except BaseException as error:
                claim.exit_again(error)
                if not isinstance(error, StaleStepRunError):
                    raise
                claim.raise_unless_taken_over(error)

    @with_claim_settings
    def claim_step(
        self,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        **settings: Unpack[ClaimSettings],
    ) -> Claim:
        """Returns a `with` block that holds the claim on a step: `run_step` for a block of code.

        Nothing is sent before the block is entered. Inside it, check `claim.decision`: on "execute", do the work and
        call `claim.complete(output)`; on "skip", the step is already completed, and `claim.output` has the output. An
        exception that leaves the block is recorded with `fail_step`. Entering the block raises what `run_step` raises.

        Args:
            run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
            step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
                str, else its name).
            input: the step's input, a dict. It is stored unless the step was scheduled with its own.
            **settings: how the step is claimed, and what a failure means: see `ClaimSettings`.

        Returns:
            The claim.

        Raises:
            InvalidArgumentError: `lease`, `on_busy`, `permanent` or `backoff` was rejected.
        """
        return Claim(self, self._transport, claim_request(run_id, step, input, **settings))

    @named_first
    @with_function_settings
    def step(
        self,
        name: Step,
        *,
        run_id: RunIdOf,
        labels: LabelsOf | None = None,
        exclude: tuple[str, ...] = (),
        **settings: Unpack[FunctionSettings],
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Returns a decorator that makes a function a step: it is executed once for each run id.

        Each further call with the same run id returns the stored result. The decorated function has the same signature.
        Two round trips if the function is executed, one if the step is already completed. Nothing is sent when the
        function is decorated.

        The given arguments are stored by name as the step's input, and the result as `{"result": …}`. Both must be
        valid in a payload. The function receives the arguments as they are given, unless the step was scheduled with
        others.

        Args:
            name: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
                str, else its name).
            run_id: how to make the run id from the function's arguments: a format string such as "order-{order_id}",
                whose values must not be None, or a function of the arguments.
            labels: labels of the run if this step creates it, by which `runs` finds it: a dict of format strings over
                the function's arguments, such as {"tenant": "{tenant}"}, or a function of the arguments that returns a
                dict of str; None: none. A format string must not name excluded parameters. If one of its arguments is
                None, there is no such label. An existing run keeps its own labels.
            exclude: names of parameters that are neither stored nor part of the fingerprint, for example passwords or
                connections. When the step is executed, the function receives them as given in this call. A `run_id`
                format string must not name them; a `run_id` function receives them.
            **settings: how the step is claimed, and what a failure means: see `FunctionSettings`.

        Returns:
            The decorator. The decorated function returns the stored result (a tuple as a list), and raises what
            `run_step` raises; InvalidArgumentError also if the run id would contain None.

        Raises:
            InvalidArgumentError: an argument was rejected, when the function is decorated: for example, a `run_id` that
                names something that is not a parameter of the function, or a parameter whose default is None; a name in
                `exclude` that is not a parameter; a function as `run_id`, `backoff`, `fingerprint` or `labels` that
                cannot be called with its arguments; a coroutine function on a StepRunStore, a plain function on an
                AsyncStepRunStore, and a generator function on both.
        """
        from squidstep_redis.functions.decorators import blocking_step  # noqa: PLC0415 -- only decorators need it
        from squidstep_redis.functions.settings import checked_settings  # noqa: PLC0415 -- only decorators need it

        return blocking_step(self, name, run_id, exclude, checked_settings(settings), labels)

    @with_claim_settings
    def run(
        self,
        run_id: RunId,
        *,
        exclude: tuple[str, ...] = (),
        **settings: Unpack[ClaimSettings],
    ) -> Run:
        """Returns an object that calls functions as the steps of one run: `store.run("order-7").call("pay", pay, 3)`.

        Nothing is sent. Make one object for each execution of the run: if one step is called with two inputs on one
        object, InputMismatchError is raised.

        Args:
            run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
            exclude: names of parameters that are neither stored nor part of the fingerprint, for example passwords or
                connections. It applies to the called functions that have such a parameter. When a step is executed,
                its function receives them as given in this call.
            **settings: how the step is claimed, and what a failure means: see `ClaimSettings`.

        Returns:
            The run. Its method `call` executes a function as a step.

        Raises:
            InvalidArgumentError: an argument was rejected.
        """
        from squidstep_redis.functions.runs import Run  # noqa: PLC0415 -- only calls of functions need it
        from squidstep_redis.functions.settings import checked_settings  # noqa: PLC0415 -- only calls of functions need it

        return Run(self, run_id, exclude, checked_settings(settings))

    def doctor(self, *, lease: Seconds | None = None, job_timeout: Seconds | None = None) -> Diagnosis:
        """Checks whether the guarantees hold on the server and the client, and what limits them.

        It executes every transition on a scratch run and deletes it; on a cluster, one on each primary. Twenty round
        trips per server. A problem is a finding, not an exception. A server that cannot be reached is reported a second
        after the first attempt, plus one attempt.

        Args:
            lease: seconds, or a timedelta, of the leases that you pass to `begin_step` and never extend; None: do not
                check them.
            job_timeout: seconds, or a timedelta, that the work under such a lease may take; None: do not check it.

        Returns:
            The findings.

        Raises:
            InvalidArgumentError: an argument was rejected before anything was sent.
        """
        return run_workflow(self._transport, examine(self.calls, self._client_facts(lease, job_timeout)))

    def close(self) -> None:
        """Ends the store's threads as soon as no claim needs them; closes the client if `from_url` made it."""
        end_heartbeat(self)
        self._transport.close()
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
