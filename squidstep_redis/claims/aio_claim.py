"""The claim of an asyncio store: an `async with` block."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

from squidstep_redis.claims.aio_background import LastingSender, LeavingSender, PerLoop, SideConnections
from squidstep_redis.claims.aio_heartbeat import AsyncHeartbeat
from squidstep_redis.claims.claim import Claim
from squidstep_redis.claims.request import ClaimRequest
from squidstep_redis.claims.rules import BaseClaim
from squidstep_redis.claims.unfinished import INTERRUPTED_SECONDS, UnfinishedClaim, ends_process, recover
from squidstep_redis.docstrings import with_docs_of
from squidstep_redis.errors import SquidstepError, StaleStepRunError
from squidstep_redis.model import StepRun
from squidstep_redis.protocol.arguments import Seconds, StepInputs
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.workflow import Send, Workflow
from squidstep_redis.server_errors import NotSentError, OutcomeUnknownError, RefusedError
from squidstep_redis.transport.aio import AsyncTransport, run_workflow
from squidstep_redis.transport.aio_tasks import cancellations

MAX_BACKGROUND_SECONDS: Final = 86_400.0  # seconds to end a claim without a lease, because nothing else would end it


T = TypeVar("T")


class LoopState:
    """What a store has in each event loop."""

    def __init__(self, transport: AsyncTransport) -> None:
        self.side = SideConnections(transport)
        self.heartbeat = AsyncHeartbeat(self.side)


class AsyncClaim(BaseClaim[asyncio.Event]):
    """A step to be executed or skipped by this delivery: the `async with` block that `claim_step` returns."""

    def __init__(
        self,
        store: Any,  # of a higher layer
        transport: AsyncTransport,
        request: ClaimRequest,
        cancel_when_lost: bool,
        cancel_with_run: bool,
        per_loop: PerLoop[LoopState],
    ) -> None:
        super().__init__(store.calls, request, asyncio.Event(), asyncio.Event())
        self.store = store
        self._transport = transport
        self._cancels_when_lost, self._cancels_with_run = cancel_when_lost, cancel_with_run
        self._per_loop = per_loop
        self._heartbeat: AsyncHeartbeat | None = None
        self._task: asyncio.Task[Any] | None = None
        self._ending: Call[StepRun] | None = None  # what is being sent to end the claim, or was when it was cancelled
        self._has_cancelled = False
        self._cancelled_before = 0  # by others, whose cancellations the task has swallowed

    async def __aenter__(self) -> Self:
        try:
            await run_workflow(self._transport, self._acquire())
            self._enter()
            self._task, self._has_cancelled = asyncio.current_task(), False
            self._cancelled_before = cancellations()
            self._ending = None
            if self._state == "held" and self._lease is not None:
                self._heartbeat = self._per_loop.get().heartbeat
                self._heartbeat.add(self)
            return self
        except OutcomeUnknownError:  # the server may have granted the claim
            self._start_undoing()
            raise
        except SquidstepError:
            raise
        except BaseException as error:  # the task was cancelled before the work started
            self._stop()
            if self._sent is not None and not ends_process(error):
                await self._undo(error)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            missing = stopped = interruption = None
            cancelling = self._cancelled_before
            if self._has_cancelled and self._is_own_cancellation(error) and self._loss is None:
                error = stopped = self.cancellation
            if not ends_process(error):
                sender = LeavingSender(self._lasting_sender, self._longest_retry, self._background_seconds())
                sender.waits = not isinstance(error, GeneratorExit)  # a coroutine that is closed must not wait
                missing = await run_workflow(cast("AsyncTransport", sender), self._on_exit(error))
                interruption = sender.interruption
        except BaseException as from_outside:
            self.exit_again(from_outside if error is None else error)
            raise
        finally:
            self._stop()
            if self._has_cancelled and self._task is not None:
                cancelling = self._task.uncancel()
        if interruption is not None:
            raise interruption
        if missing is not None:
            raise missing
        if self._has_cancelled:
            if stopped is not None:
                raise stopped from None
            is_own = isinstance(error, asyncio.CancelledError) and cancelling == self._cancelled_before
            if self._loss is not None and is_own:
                if not isinstance(self._loss, StaleStepRunError):
                    raise self._loss
                await run_workflow(self._transport, self._reconcile())
                return True
        return False

    def exit_again(self, error: BaseException) -> None:
        """Exits the block in the background if an exception from outside kept `__aexit__` from doing it.

        Args:
            error: the error of the work, or else the exception from outside.
        """
        if self._entered_by is None:
            return
        if self._is_held_here and not ends_process(error):
            unfinished = UnfinishedClaim()
            unfinished.step_run, unfinished.error = self._claim, error
            unfinished.verdict_of, unfinished.checkpoint = self._verdict, self._lazy.pending
            with suppress(NotSentError):
                sender = self._lasting_sender()
                ending = self._ending
                sender.start(
                    lambda: run_workflow(cast("AsyncTransport", sender), self._recover(unfinished, ending)),
                    self._background_seconds(),
                )
        self._stop()

    def _recover(self, unfinished: UnfinishedClaim, ending: Call[StepRun] | None) -> Workflow[None]:
        if ending is not None:  # as in `_on_exit`
            try:
                yield Send(ending._replace(may_have_run=True))
                return
            except RefusedError:
                pass
        yield from recover(self._calls, unfinished)

    def _finish(self, call: Call[StepRun]) -> Workflow[StepRun]:
        self._ending = call
        try:
            step_run = yield from super()._finish(call)
        except Exception:
            self._ending = None
            raise
        self._ending = None
        return step_run

    def _on_exit(self, error: BaseException | None) -> Workflow[BaseException | None]:
        if self._ending is not None and self._is_held_here and not isinstance(error, Exception | None):
            # The work was done when its task was cancelled. A failure might overtake its result, and repeat the work.
            call = self._ending._replace(retryable=False, may_have_run=True)
            try:
                yield Send(call)
            except RefusedError:  # nothing was written
                self._ending = None
            except SquidstepError as problem:
                error.add_note(f"squidstep_redis could not end this claim: {type(problem).__name__}: {problem}")
                return None
            else:
                return None
        return (yield from super()._on_exit(error))

    def _is_own_cancellation(self, error: BaseException | None) -> bool:
        """Whether the block ends because this claim, and nothing else, has cancelled its task."""
        if not isinstance(error, asyncio.CancelledError) or self._task is None:
            return False
        return self._task.cancelling() == self._cancelled_before + 1

    @with_docs_of(Claim.checkpoint)
    async def checkpoint(self, progress: Mapping[str, Any], *, lazy: bool = False) -> None:
        await self._run(self._checkpoint(progress, lazy))
        if self._cancels_with_run and self.cancellation is not None:
            raise self.cancellation

    @with_docs_of(Claim.complete)
    async def complete(self, output: Mapping[str, Any], *, schedule: StepInputs | None = None) -> StepRun:
        return await self._run(self._complete(output, schedule))

    @with_docs_of(Claim.fail)
    async def fail(
        self, error: Mapping[str, Any] | BaseException, *, final: bool = False, retry_after: Seconds | None = None
    ) -> StepRun:
        return await self._run(self._fail(error, final, retry_after))

    @with_docs_of(Claim.release)
    async def release(self) -> StepRun:
        return await self._run(self._release())

    async def _run(self, workflow: Workflow[T]) -> T:
        """Runs a workflow about the claim; an exhausted pool does not delay it."""
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
        if self._cancels_when_lost:
            self._cancel_task("the claim on the step was lost")

    def _signal_cancelled(self) -> None:
        super()._signal_cancelled()
        if self._cancels_with_run and self._task is not asyncio.current_task():  # otherwise, `checkpoint` raises
            self._cancel_task("the run was cancelled")

    def _cancel_task(self, why: str) -> None:
        """Cancels the task of the block, once."""
        if self._task is not None and not self._has_cancelled:
            self._has_cancelled = self._task.cancel(why)

    def _stop(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.discard(self)
            self._heartbeat = None
        self._exit()

    def _lasting_sender(self) -> LastingSender:
        """Makes a sender of calls in the background; raises NotSentError if the event loop is closed."""
        try:
            side = self._per_loop.get().side
        except RuntimeError as error:
            raise NotSentError("claim", None, None, "its event loop has ended; its lease expires", False) from error
        return LastingSender(self._transport, side)

    def _background_seconds(self) -> float:
        """Returns how long to try to give back the claim or record its failure: afterwards, its lease has expired."""
        return self._lease_seconds or MAX_BACKGROUND_SECONDS

    async def _undo(self, error: BaseException) -> None:
        with suppress(NotSentError):
            undoing = self._start_undoing()
            if not isinstance(error, GeneratorExit):  # a coroutine that is closed must not wait
                await asyncio.wait([undoing], timeout=INTERRUPTED_SECONDS)

    def _start_undoing(self) -> asyncio.Task[None]:
        """Gives back what `_acquire` may have claimed, in a task that no cancellation ends."""
        sender = self._lasting_sender()
        return sender.start(
            lambda: run_workflow(cast("AsyncTransport", sender), self._undo_acquire()), self._background_seconds()
        )
