"""The asyncio store: its operations, and the claim that is an `async with` block."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import cached_property
from inspect import isawaitable
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar, cast

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from squidstep_redis.claims.aio_background import (
    LastingSender,
    LeavingSender,
    PerLoop,
    SideConnections,
    wait_for_background_of,
)
from squidstep_redis.claims.aio_heartbeat import AsyncHeartbeat
from squidstep_redis.claims.rules import DEFAULT_LEASE, BaseClaim, OnBusy
from squidstep_redis.claims.unsettled import INTERRUPTED_SECONDS
from squidstep_redis.doctor.examine import Diagnosis, examine
from squidstep_redis.errors import (
    InvalidArgumentError,
    NotSentError,
    OutcomeUnknownError,
    SquidstepError,
    StaleStepRunError,
    described,
)
from squidstep_redis.facade import BaseStore, as_method, with_docs_of
from squidstep_redis.model import StepRun
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import RunId, Seconds, Step, StepInputs
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.workflow import Workflow
from squidstep_redis.store import Claim, StepRunStore
from squidstep_redis.transport.aio import AsyncTransport, run_workflow

P = ParamSpec("P")
T = TypeVar("T")

MAX_BACKGROUND_SECONDS: Final = 86_400.0  # to end a claim without a lease, which nothing else would end


class AsyncStepRunStore(BaseStore[redis.Redis | redis.RedisCluster, AsyncTransport]):
    """Decides which delivery of a step executes, and stores its input, output and error: the asyncio store."""

    _client_types = (redis.Redis, redis.RedisCluster)
    _transport_type = AsyncTransport

    @staticmethod
    def _call(
        operation: Callable[Concatenate[Calls, P], Call[T]],
    ) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
        """Returns the method that sends an operation's call."""

        async def method(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
            return await self._transport.send(operation(self.calls, *args, **kwargs))

        return as_method(method, operation, "AsyncStepRunStore")

    @staticmethod
    def _workflow(
        operation: Callable[Concatenate[Calls, P], Workflow[T]],
    ) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
        """Returns the method that runs an operation's workflow."""

        async def method(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
            return await run_workflow(self._transport, operation(self.calls, *args, **kwargs))

        return as_method(method, operation, "AsyncStepRunStore")

    schedule_step = _call(Calls.schedule_step)
    schedule_steps = _call(Calls.schedule_steps)
    delete_pending_steps = _call(Calls.delete_pending_steps)

    begin_step = _call(Calls.begin_step)
    begin_steps = _call(Calls.begin_steps)
    complete_step = _call(Calls.complete_step)
    complete_steps = _workflow(Calls.complete_steps)
    advance_step = _call(Calls.advance_step)
    fail_step = _call(Calls.fail_step)
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
    delete_run = _call(Calls.delete_run)
    runs = _workflow(Calls.runs)
    purge = _workflow(Calls.purge)

    retry_step = _call(Calls.retry_step)
    retry_run = _workflow(Calls.retry_run)
    export_run = _call(Calls.export_run)
    import_run = _call(Calls.import_run)

    batch = _workflow(Calls.batch)

    @classmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> redis.Redis:
        client: Any = redis.Redis
        return client.from_url(url, **{"retry": Retry(NoBackoff(), 0), **options})

    @with_docs_of(StepRunStore.send)
    async def send(self, call: Call[T]) -> T:
        return await self._transport.send(call)

    @with_docs_of(
        StepRunStore.run_step,
        fn="does the work: a coroutine function, or a plain one. It receives the stored input and returns the output.\n"
        "                `current_claim()` is its claim. If it blocks the event loop longer than the lease, the claim\n"
        "                is lost.",
        cancel_when_lost="whether to cancel `fn` when the claim is lost; the winner's result is still returned.",
    )
    async def run_step(
        self,
        run_id: RunId,
        step: Step,
        fn: Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]] | Mapping[str, Any]],
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = DEFAULT_LEASE,
        max_attempts: int | None = None,
        on_busy: OnBusy = "raise",
        owner: str | None = None,
        cancel_when_lost: bool = False,
    ) -> dict[str, Any]:
        if not callable(fn):
            raise InvalidArgumentError("fn", f"must be callable, not {described(fn)}")
        while True:
            claim = self.claim_step(
                run_id,
                step,
                input,
                lease=lease,
                max_attempts=max_attempts,
                on_busy=on_busy,
                owner=owner,
                cancel_when_lost=cancel_when_lost,
            )
            try:
                async with claim:
                    if claim.decision == "execute":
                        output = fn(claim.input)
                        output = await output if isawaitable(output) else output
                        if not claim.ended:
                            await claim.complete(output)
                return claim.result()
            except StaleStepRunError as error:
                claim.raise_unless_running(error)

    @with_docs_of(
        StepRunStore.claim_step,
        cancel_when_lost="whether to cancel the block when the claim is lost; the block then ends as with\n"
        "                `claim.complete`.",
    )
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
        cancel_when_lost: bool = False,
    ) -> AsyncClaim:
        return AsyncClaim(
            self,
            self._transport,
            run_id,
            step,
            input,
            lease,
            max_attempts,
            on_busy,
            owner,
            cancel_when_lost,
            self._per_loop,
        )

    @with_docs_of(StepRunStore.doctor)
    async def doctor(self, *, lease: Seconds | None = None, job_timeout: Seconds | None = None) -> Diagnosis:
        return await run_workflow(self._transport, examine(self.calls, self._client_facts(lease, job_timeout)))

    async def close(self) -> None:
        """Closes the client if `from_url` made it.

        It first waits, for a second at most, until cancelled tasks have given back their claims.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # a child that was forked in a coroutine: everything is the parent's
            return
        try:
            await wait_for_background_of(self._transport, INTERRUPTED_SECONDS)
            await self._per_loop.get().heartbeat.stop()
        finally:
            self._transport.close()
            if self._owns_client:
                await self.client.aclose()

    @cached_property
    def _per_loop(self) -> PerLoop[_LoopState]:
        return PerLoop(lambda: _LoopState(self._transport))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class _LoopState:
    """What a store has in each event loop."""

    def __init__(self, transport: AsyncTransport) -> None:
        self.side = SideConnections(transport)
        self.heartbeat = AsyncHeartbeat(self.side)


class AsyncClaim(BaseClaim[asyncio.Event]):
    """A step to be executed or skipped by this delivery: the `async with` block that `claim_step` returns."""

    store: AsyncStepRunStore

    def __init__(
        self,
        store: AsyncStepRunStore,
        transport: AsyncTransport,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        lease: Seconds | None,
        max_attempts: int | None,
        on_busy: OnBusy,
        owner: str | None,
        cancel_when_lost: bool,
        per_loop: PerLoop[_LoopState],
    ) -> None:
        super().__init__(store.calls, run_id, step, input, lease, max_attempts, on_busy, owner, asyncio.Event())
        self.store = store
        self._transport = transport
        self._cancels = cancel_when_lost
        self._per_loop = per_loop
        self._heartbeat: AsyncHeartbeat | None = None
        self._task: asyncio.Task[Any] | None = None
        self._has_cancelled = False

    async def __aenter__(self) -> Self:
        try:
            await run_workflow(self._transport, self._acquire())
            self._enter()
            self._task, self._has_cancelled = asyncio.current_task(), False
            if self._state == "held" and self._lease is not None:
                self._heartbeat = self._per_loop.get().heartbeat
                self._heartbeat.add(self)
        except OutcomeUnknownError:  # the server may have granted the claim
            self._start_undoing()
            raise
        except SquidstepError:
            raise
        except BaseException as error:  # the task was cancelled before the work started
            self._stop()
            if self._sent is not None and not _ends_process(error):
                await self._undo(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        missing = None
        try:
            if not _ends_process(error):
                sender = LeavingSender(self._lasting_sender, self._longest_retry, self._background_seconds())
                sender.waits = not isinstance(error, GeneratorExit)  # a coroutine that is closed must not wait
                missing = await run_workflow(cast("AsyncTransport", sender), self._on_exit(error))
        finally:
            self._stop()
        if missing is not None:
            raise missing
        if self._has_cancelled and self._task is not None and self._loss is not None:
            others = self._task.uncancel()
            if isinstance(error, asyncio.CancelledError) and not others:
                if not isinstance(self._loss, StaleStepRunError):
                    raise self._loss
                await run_workflow(self._transport, self._reconcile())
                return True
        return False

    @with_docs_of(Claim.complete)
    async def complete(self, output: Mapping[str, Any], *, schedule: StepInputs | None = None) -> StepRun:
        return await self._end(self._complete(output, schedule))

    @with_docs_of(Claim.fail)
    async def fail(self, error: Mapping[str, Any] | BaseException) -> StepRun:
        return await self._end(self._fail(error))

    @with_docs_of(Claim.release)
    async def release(self) -> StepRun:
        return await self._end(self._release())

    async def _end(self, workflow: Workflow[StepRun]) -> StepRun:
        """Runs a workflow that ends the claim; an exhausted pool does not delay it."""
        if not self._transport.is_pool_exhausted:
            return await run_workflow(self._transport, workflow)
        side = self._per_loop.get().side
        side.acquire()
        try:
            return await run_workflow(side.transport, workflow)
        finally:
            side.release()

    def is_of_this_code(self, step_run: StepRun) -> bool:
        """Whether this task executes the step under this claim.

        Another task may inherit the claim's context, and may wait for the step.
        """
        return self._task is asyncio.current_task() and super().is_of_this_code(step_run)

    def _signal_lost(self) -> None:
        super()._signal_lost()
        if self._cancels and self._task is not None:
            self._has_cancelled = self._task.cancel("the claim on the step was lost")

    def _stop(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.discard(self)
            self._heartbeat = None
        self._exit()

    def _lasting_sender(self) -> LastingSender:
        """Makes what sends calls in the background; raises NotSentError if there is no event loop any more."""
        try:
            side = self._per_loop.get().side
        except RuntimeError as error:
            raise NotSentError("claim", None, None, "its event loop has ended; its lease expires", False) from error
        return LastingSender(self._transport, side)

    def _background_seconds(self) -> float:
        """Returns for how long to give back the claim or record its failure: afterwards, its lease has expired."""
        return self._lease_seconds or MAX_BACKGROUND_SECONDS

    async def _undo(self, error: BaseException) -> None:
        with suppress(NotSentError):
            undoing = self._start_undoing()
            if not isinstance(error, GeneratorExit):  # a coroutine that is closed must not wait
                await asyncio.wait([undoing], timeout=INTERRUPTED_SECONDS)

    def _start_undoing(self) -> asyncio.Task[None]:
        """Gives back what `_acquire` may have claimed, in a task that no cancellation ends."""
        sender = self._lasting_sender()
        undoing = run_workflow(cast("AsyncTransport", sender), self._undo_acquire())
        return sender.start(undoing, self._background_seconds())


def _ends_process(error: BaseException | None) -> bool:
    """Whether the error stands for the end of the process, in tests: then nothing is sent any more."""
    return bool(getattr(error, "ends_process", False))
