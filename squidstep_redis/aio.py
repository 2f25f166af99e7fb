"""The asyncio store: its operations, and the claim that is an `async with` block."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from inspect import isawaitable
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

from squidstep_redis.claims.heartbeat import async_heartbeat_of
from squidstep_redis.claims.rules import DEFAULT_LEASE, BaseClaim, OnBusy
from squidstep_redis.doctor.examine import Diagnosis, examine
from squidstep_redis.errors import InvalidArgumentError, SquidstepError, StaleStepRunError, described
from squidstep_redis.model import StepRun
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import RunId, Seconds, Step, StepInputs
from squidstep_redis.protocol.call import Call, Exchange, Plan
from squidstep_redis.settings import documented
from squidstep_redis.transport.aio import AsyncSender, run_workflow

P = ParamSpec("P")
T = TypeVar("T")

RELEASE_TIMEOUT: Final = 1.0  # seconds to give a claim back; after that its lease does


def _operation(
    make: Callable[Concatenate[Calls, P], Call[T]],
) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
    """The method that makes a call and sends it."""

    async def operation(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(make(self.calls, *args, **kwargs))

    return documented(operation, make, "AsyncStepRunStore")


def _exchange(
    make: Callable[Concatenate[Calls, P], Exchange[T]],
) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
    """The method that carries an exchange through."""

    async def carried(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        exchange = make(self.calls, *args, **kwargs)
        try:
            calls = next(exchange)
            while True:
                calls = exchange.send(await self._send_all(calls))  # pyright: ignore[reportPrivateUsage]: its own
        except StopIteration as end:
            return end.value

    return documented(carried, make, "AsyncStepRunStore")


def _planned(
    make: Callable[Concatenate[Calls, P], Plan[T]],
) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
    """The method that carries a plan out."""

    async def planned(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return await run_workflow(self, make(self.calls, *args, **kwargs))

    return documented(planned, make, "AsyncStepRunStore")


class AsyncStepRunStore(AsyncSender):
    """Decides which delivery of a step executes, and keeps what came of it: the store, for asyncio."""

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
    scan_steps = _operation(Calls.scan_steps)
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
        """Executes a step once across all deliveries: `StepRunStore.run_step`, which says all that is not said here.

        The heartbeat is the event loop's: a function that blocks it for longer than the lease loses the claim.

        Args:
            run_id: as there.
            step: as there.
            fn: a coroutine function, or a plain one that does not block for long.
            input: as there.
            lease: as there.
            max_attempts: as there.
            on_busy: as there.
            owner: as there.
            cancel_when_lost: cancels `fn` when the claim is found to be lost; the winner's result is answered as ever.

        Returns:
            The stored output.

        Raises:
            As there.
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
        cancel_when_lost: bool = False,
    ) -> AsyncClaim:
        """Makes an `async with` block that holds the claim on a step: see `StepRunStore.claim_step`.

        Args:
            run_id: as for `run_step`, like all the others.
            step: see there.
            input: see there.
            lease: see there.
            max_attempts: see there.
            on_busy: see there.
            owner: see there.
            cancel_when_lost: cancels the block when the claim is found to be lost; the block then ends as
                `claim.complete` would.

        Raises:
            As `run_step`, from entering the block.
        """
        return AsyncClaim(self, run_id, step, input, lease, max_attempts, on_busy, owner, cancel_when_lost)

    async def doctor(self, *, lease: Seconds | None = None, job_timeout: Seconds | None = None) -> Diagnosis:
        """Examines the server and the client: see `StepRunStore.doctor`."""
        return await run_workflow(self, examine(self.calls, self._client_facts(lease, job_timeout)))

    async def close(self) -> None:
        """Closes the client, if `from_url` made it."""
        if self._owns_client:
            await async_heartbeat_of(self.client).stop()
            await self.client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class AsyncClaim(BaseClaim[asyncio.Event]):
    """A step to be executed by this delivery or skipped: the `async with` block that `claim_step` makes."""

    store: AsyncStepRunStore

    def __init__(
        self,
        store: AsyncStepRunStore,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        lease: Seconds | None,
        max_attempts: int | None,
        on_busy: OnBusy,
        owner: str | None,
        cancel_when_lost: bool,
    ) -> None:
        super().__init__(store.calls, run_id, step, input, lease, max_attempts, on_busy, owner, asyncio.Event())
        self.store = store
        self._cancels = cancel_when_lost
        self._task: asyncio.Task[Any] | None = None
        self._has_cancelled = False

    async def __aenter__(self) -> Self:
        try:
            await run_workflow(self.store, self._acquire())
            self._enter()
            self._task, self._has_cancelled = asyncio.current_task(), False
            if self._state == "held" and self._lease is not None:
                async_heartbeat_of(self.store.client).add(self)
        except SquidstepError:
            raise
        except BaseException:  # the task was cancelled: the work has not begun
            self._stop()
            with suppress(SquidstepError, TimeoutError):
                async with asyncio.timeout(RELEASE_TIMEOUT):
                    await run_workflow(self.store, self._undo_acquire())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            missing = await run_workflow(self.store, self._on_exit(error))
        finally:
            self._stop()
        if missing is not None:
            raise missing
        if self._has_cancelled and self._task is not None and self._loss is not None:
            others = self._task.uncancel()
            if isinstance(error, asyncio.CancelledError) and not others:
                if not isinstance(self._loss, StaleStepRunError):
                    raise self._loss
                await run_workflow(self.store, self._reconcile())
                return True
        return False

    async def complete(self, output: Mapping[str, Any], *, schedule: StepInputs | None = None) -> StepRun:
        """Ends the claim with an output; returns and raises as `Claim.complete`."""
        return await run_workflow(self.store, self._completing(output, schedule))

    async def fail(self, error: Mapping[str, Any] | BaseException) -> StepRun:
        """Ends the claim with an error, see `fail_step`; otherwise as `complete`."""
        return await run_workflow(self.store, self._failing(error))

    async def release(self) -> StepRun:
        """Gives the claim back before the work took effect, see `release_step`; otherwise as `complete`."""
        return await run_workflow(self.store, self._releasing())

    def is_of_this_code(self, step_run: StepRun) -> bool:
        """Likewise; another task may inherit its context, and may well wait for it."""
        return self._task is asyncio.current_task() and super().is_of_this_code(step_run)

    def _signal_lost(self) -> None:
        super()._signal_lost()
        if self._cancels and self._task is not None:
            self._has_cancelled = self._task.cancel("the claim on the step was lost")

    def _stop(self) -> None:
        if self._lease is not None:
            async_heartbeat_of(self.store.client).discard(self)
        self._exit()
