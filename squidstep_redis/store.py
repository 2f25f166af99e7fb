"""The blocking store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from squidstep_redis.claims.claim import Claim
from squidstep_redis.claims.failures import Backoff, Permanent
from squidstep_redis.claims.heartbeat import end_heartbeat
from squidstep_redis.claims.request import DEFAULT_LEASE, OnBusy, claim_request
from squidstep_redis.doctor.examine import Diagnosis, examine
from squidstep_redis.errors import InvalidArgumentError, StaleStepRunError, described
from squidstep_redis.facade import BaseStore, as_method
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import RunId, Seconds, Step
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.fingerprints import Fingerprint
from squidstep_redis.protocol.workflow import Workflow
from squidstep_redis.transport.blocking import BlockingTransport, run_workflow

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

    lapsed_claims = _workflow(Calls.lapsed_claims)
    live_claims = _workflow(Calls.live_claims)
    failed_steps = _workflow(Calls.failed_steps)
    count_claims = _workflow(Calls.count_claims)

    expire_run = _call(Calls.expire_run)
    cancel_run = _call(Calls.cancel_run)
    resume_run = _call(Calls.resume_run)
    delete_run = _call(Calls.delete_run)
    summarize_run = _workflow(Calls.summarize_run)
    runs = _workflow(Calls.runs)
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
        """
        return self._transport.send(call)

    def run_step(
        self,
        run_id: RunId,
        step: Step,
        fn: Callable[[dict[str, Any]], Mapping[str, Any] | None],
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = DEFAULT_LEASE,
        max_attempts: int | None = None,
        permanent: Permanent = (),
        backoff: Backoff | None = None,
        on_busy: OnBusy = "raise",
        owner: str | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> dict[str, Any]:
        """Executes a step once across all deliveries, and returns its stored output from then on.

        Two round trips if it executes, one if it skips. Meanwhile a heartbeat extends the leases of all claims of this
        process, a third of the lease after the last extension: one round trip for all claims of one store.

        An exception of `fn` is recorded with `fail_step` and re-raised. PermanentError, and the types in `permanent`,
        make the step fail permanently; RetryLater, and `backoff`, delay the next attempt. If the claim is lost to a
        takeover, `current_claim().lost` is set, the late result is discarded, and the winner's result is returned. A
        result, or a failure, that cannot be sent is retried for as long as the lease, but for at most a minute. If the
        process is interrupted (a signal, a cancellation), that takes at most a second. A claim whose begin got no reply
        is released once the server replies again.

        Args:
            run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
            step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
                str, else its name).
            fn: does the work: receives the stored input and returns the output, a dict; None stands for {}.
                `current_claim()` is its claim.
            input: the step's input, a dict. It is stored unless the step was scheduled with its own.
            lease: seconds, or a timedelta, after which another worker may take over from one that is dead or hangs;
                None: never.
            max_attempts: number of claims to grant in total, not counting released ones; None: no limit.
            permanent: a type of exception, or a tuple of them, besides PermanentError: if the work raises one, the step
                has failed permanently.
            backoff: how long the step cannot be claimed after any other exception: a function that returns the seconds,
                or a timedelta, given how many attempts there were, such as an ExponentialBackoff. It is not called
                after RetryLater. None: the step can be claimed at once.
            on_busy: what to do while another worker holds the step, or while it may not be retried yet: "raise", or
                "wait" until it is completed or can be claimed (polling at most once a second).
            owner: who claims, shown to operators: a str of up to 256 bytes without control characters; None:
                `host:pid`.
            fingerprint: what identifies the input. True: all of it, in any order of its keys; a function of the input:
                what it returns, which may be anything that a payload may contain; a str of up to 256 bytes without
                control characters: that itself; False: nothing; None: the store's setting. If the step has another
                fingerprint, the call is refused.

        Returns:
            The stored output.

        Raises:
            InputMismatchError: the step has another fingerprint; nothing was written.
            StepBusyError: another worker holds the step, or took it over.
            StepDelayedError: the step has failed and may not be retried yet.
            RunCancelledError: the run is cancelled.
            StepFailedError: the step has failed permanently.
            StepExhaustedError: `max_attempts` is reached.
            StaleStepRunError: the claim was lost, and no worker has completed the step or is running it.
            PayloadError: the output of `fn` cannot be stored. The step has failed permanently, because the work may
                have taken effect.
            InvalidArgumentError: an argument was rejected before anything was sent.
            ServerError: the server or the connection failed, at the beginning or when the result was sent.
        """
        if not callable(fn):
            raise InvalidArgumentError("fn", f"must be callable, not {described(fn)}")
        while True:
            claim = self.claim_step(
                run_id,
                step,
                input,
                lease=lease,
                max_attempts=max_attempts,
                permanent=permanent,
                backoff=backoff,
                on_busy=on_busy,
                owner=owner,
                fingerprint=fingerprint,
            )
            try:
                with claim:
                    if claim.decision == "execute":
                        output = fn(claim.input)
                        if not claim.ended:
                            claim.complete({} if output is None else output)
                return claim.result()
            except BaseException as error:
                claim.exit_again(error)
                if not isinstance(error, StaleStepRunError):
                    raise
                claim.raise_unless_taken_over(error)

    def claim_step(
        self,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = DEFAULT_LEASE,
        max_attempts: int | None = None,
        permanent: Permanent = (),
        backoff: Backoff | None = None,
        on_busy: OnBusy = "raise",
        owner: str | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> Claim:
        """Returns a `with` block that holds the claim on a step: `run_step` for code that is not one function.

        Nothing is sent before the block is entered. Inside it, look at `claim.decision`: on "execute" do the work and
        call `claim.complete(output)`; on "skip" the step is already completed, and `claim.output` has the output. An
        exception that leaves the block is recorded with `fail_step`. Entering the block raises what `run_step` raises.

        Args:
            run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
            step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
                str, else its name).
            input: the step's input, a dict. It is stored unless the step was scheduled with its own.
            lease: seconds, or a timedelta, after which another worker may take over from one that is dead or hangs;
                None: never. A heartbeat extends it meanwhile.
            max_attempts: number of claims to grant in total, not counting released ones; None: no limit.
            permanent: a type of exception, or a tuple of them, besides PermanentError: if the work raises one, the step
                has failed permanently.
            backoff: how long the step cannot be claimed after any other exception: a function that returns the seconds,
                or a timedelta, given how many attempts there were, such as an ExponentialBackoff. It is not called
                after RetryLater. None: the step can be claimed at once.
            on_busy: what to do while another worker holds the step, or while it may not be retried yet: "raise", or
                "wait" until it is completed or can be claimed (polling at most once a second).
            owner: who claims, shown to operators: a str of up to 256 bytes without control characters; None:
                `host:pid`.
            fingerprint: what identifies the input. True: all of it, in any order of its keys; a function of the input:
                what it returns, which may be anything that a payload may contain; a str of up to 256 bytes without
                control characters: that itself; False: nothing; None: the store's setting. If the step has another
                fingerprint, the call is refused.

        Returns:
            The claim.

        Raises:
            InvalidArgumentError: `lease`, `on_busy`, `permanent` or `backoff` was rejected.
        """
        request = claim_request(
            run_id,
            step,
            input,
            lease=lease,
            max_attempts=max_attempts,
            permanent=permanent,
            backoff=backoff,
            on_busy=on_busy,
            owner=owner,
            fingerprint=fingerprint,
        )
        return Claim(self, self._transport, request)

    def doctor(self, *, lease: Seconds | None = None, job_timeout: Seconds | None = None) -> Diagnosis:
        """Checks whether the guarantees hold on the server and the client, and what limits them.

        It executes every transition on a scratch run and deletes it; on a cluster, one on each primary. Twenty round
        trips per server. A problem is a finding, not an exception.

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
