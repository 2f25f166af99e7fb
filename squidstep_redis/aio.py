"""The asyncio store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import cached_property
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Self, TypeVar, Unpack

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from squidstep_redis.claims.aio_background import PerLoop, wait_for_background_of
from squidstep_redis.claims.aio_claim import AsyncClaim, LoopState
from squidstep_redis.claims.request import (
    ClaimSettings,
    FunctionSettings,
    claim_request,
    with_claim_settings,
    with_function_settings,
)
from squidstep_redis.claims.unfinished import INTERRUPTED_SECONDS
from squidstep_redis.docstrings import with_docs_of
from squidstep_redis.doctor.examine import Diagnosis, examine
from squidstep_redis.errors import InvalidArgumentError, StaleStepRunError, described
from squidstep_redis.facade import BaseStore, as_method, named_first
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import LabelsOf, RunId, RunIdOf, Seconds, Step
from squidstep_redis.protocol.call import Call, check_call
from squidstep_redis.protocol.workflow import Workflow
from squidstep_redis.store import StepRunStore
from squidstep_redis.transport.aio import AsyncTransport, run_workflow
from squidstep_redis.transport.aio_connection import drop_all

if TYPE_CHECKING:
    from squidstep_redis.functions.runs import AsyncRun

P = ParamSpec("P")
T = TypeVar("T")

_CANCELLED_FUNCTION: Final = {
    "cancel_when_lost": "whether to cancel the function when the claim is lost; the winner's result is still returned.",
    "cancel_with_run": "whether to cancel the function when the run is cancelled. Then the attempt is recorded as\n"
    "        failed, and RunCancelledError is raised.",
}
"""The additional settings of the methods that call a coroutine function."""


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

    @with_docs_of(StepRunStore.send)
    async def send(self, call: Call[T]) -> T:
        return await self._transport.send(call if type(call) is Call else check_call("call", call))

    @with_claim_settings
    @with_docs_of(
        StepRunStore.run_step,
        fn="does the work: a coroutine function or a plain one. It receives the stored input and returns the output.\n"
        "        `current_claim()` is its claim. If it blocks the event loop longer than the lease, the claim\n"
        "        is lost.",
        **_CANCELLED_FUNCTION,
    )
    async def run_step(
        self,
        run_id: RunId,
        step: Step,
        fn: Callable[[dict[str, Any]], Awaitable[Mapping[str, Any] | None] | Mapping[str, Any] | None],
        input: Mapping[str, Any],
        *,
        cancel_when_lost: bool = False,
        cancel_with_run: bool = False,
        **settings: Unpack[ClaimSettings],
    ) -> dict[str, Any]:
        if not callable(fn):
            raise InvalidArgumentError("fn", f"must be callable, not {described(fn)}")
        while True:
            claim = self.claim_step(
                run_id,
                step,
                input,
                cancel_when_lost=cancel_when_lost,
                cancel_with_run=cancel_with_run,
                **settings,
            )
            try:
                async with claim:
                    if claim.decision == "execute":
                        output = fn(claim.input)
                        output = await output if isawaitable(output) else output
                        if not claim.ended:
                            await claim.complete({} if output is None else output)
                return claim.result()
            except StaleStepRunError as error:
                claim.raise_unless_taken_over(error)
            except BaseException as error:
                claim.exit_again(error)
                raise

    @with_claim_settings
    @with_docs_of(
        StepRunStore.claim_step,
        cancel_when_lost="whether to cancel the block when the claim is lost; the block then ends as with\n"
        "        `claim.complete`.",
        cancel_with_run="whether to cancel the block when the run is cancelled. Then the attempt is recorded as\n"
        "        failed, and RunCancelledError is raised.",
    )
    def claim_step(
        self,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        *,
        cancel_when_lost: bool = False,
        cancel_with_run: bool = False,
        **settings: Unpack[ClaimSettings],
    ) -> AsyncClaim:
        request = claim_request(run_id, step, input, **settings)
        return AsyncClaim(self, self._transport, request, cancel_when_lost, cancel_with_run, self._per_loop)

    @named_first
    @with_function_settings
    @with_docs_of(StepRunStore.step, **_CANCELLED_FUNCTION)
    def step(
        self,
        name: Step,
        *,
        run_id: RunIdOf,
        labels: LabelsOf | None = None,
        exclude: tuple[str, ...] = (),
        cancel_when_lost: bool = False,
        cancel_with_run: bool = False,
        **settings: Unpack[FunctionSettings],
    ) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
        from squidstep_redis.functions.decorators import asyncio_step  # noqa: PLC0415 -- only decorators need it
        from squidstep_redis.functions.settings import asyncio_settings  # noqa: PLC0415 -- only decorators need it

        checked = asyncio_settings(settings, cancel_when_lost, cancel_with_run)
        return asyncio_step(self, name, run_id, exclude, checked, labels)

    @with_claim_settings
    @with_docs_of(StepRunStore.run, **_CANCELLED_FUNCTION)
    def run(
        self,
        run_id: RunId,
        *,
        exclude: tuple[str, ...] = (),
        cancel_when_lost: bool = False,
        cancel_with_run: bool = False,
        **settings: Unpack[ClaimSettings],
    ) -> AsyncRun:
        from squidstep_redis.functions.runs import AsyncRun  # noqa: PLC0415 -- only calls of functions need it
        from squidstep_redis.functions.settings import asyncio_settings  # noqa: PLC0415 -- only calls need it

        checked = asyncio_settings(settings, cancel_when_lost, cancel_with_run)
        return AsyncRun(self, run_id, exclude, checked)

    @with_docs_of(StepRunStore.doctor)
    async def doctor(self, *, lease: Seconds | None = None, job_timeout: Seconds | None = None) -> Diagnosis:
        return await run_workflow(self._transport, examine(self.calls, self._client_facts(lease, job_timeout)))

    async def close(self) -> None:
        """Closes the client if `from_url` made it.

        It first waits, at most a second, until cancelled tasks have released their claims.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # a child that was forked in a coroutine: everything belongs to the parent
            return
        try:
            await wait_for_background_of(self._transport, INTERRUPTED_SECONDS)
            await self._per_loop.get().heartbeat.stop()
        finally:
            self._transport.close()
            if self._owns_client:
                drop_all(self.client)  # awaits nothing that a cancellation could interrupt
                await self.client.aclose()

    @cached_property
    def _per_loop(self) -> PerLoop[LoopState]:
        return PerLoop(lambda: LoopState(self._transport))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
