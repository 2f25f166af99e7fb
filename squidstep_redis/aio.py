"""The asyncio store: the only place where it waits for the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from inspect import isawaitable
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

from redis import RedisError
from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, NoScriptError, ResponseError

from squidstep_redis import wire
from squidstep_redis.arguments import RunId, Seconds, Step, StepInputs
from squidstep_redis.base import BaseStore, documented
from squidstep_redis.calls import Calls
from squidstep_redis.claims import DEFAULT_LEASE, BaseClaim, OnBusy
from squidstep_redis.connections import AsyncLender
from squidstep_redis.doctor import Diagnosis, examine
from squidstep_redis.errors import InvalidArgumentError, SquidstepError, StaleStepRunError, described
from squidstep_redis.heartbeats import async_heartbeat_of
from squidstep_redis.model import StepRun
from squidstep_redis.sending import FAILURES, UNANSWERED, Sending, Unsettled, outcome, outcomes
from squidstep_redis.wire import OPTIONS, Call, Command, Doze, Exchange, Plan

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_WHEN_CANCELLED: Final = 1.0  # seconds to give a claim back; after that its lease does


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
                calls = exchange.send(await self._send_all(calls))  # pyright: ignore[reportPrivateUsage]: of this module
        except StopIteration as end:
            return end.value

    return documented(carried, make, "AsyncStepRunStore")


class _NodeCommand:
    """One command of a pipeline to a cluster node, as `ClusterNode.execute_pipeline` takes and answers it."""

    __slots__ = ("args", "kwargs", "result")

    def __init__(self, command: Command) -> None:
        self.args = command
        self.kwargs = dict(OPTIONS)
        self.result: Any = None


def _planned(
    make: Callable[Concatenate[Calls, P], Plan[T]],
) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
    """The method that carries a plan out."""

    async def planned(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return await _carry_out(self, make(self.calls, *args, **kwargs))

    return documented(planned, make, "AsyncStepRunStore")


class AsyncStepRunStore(BaseStore[redis.Redis | redis.RedisCluster]):
    """Decides which delivery of a step executes, and keeps what came of it: the store, for asyncio."""

    _client_types = (redis.Redis, redis.RedisCluster)
    _lender_type = AsyncLender

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
        return await _carry_out(self, examine(self.calls, self._client_facts(lease, job_timeout)))

    async def close(self) -> None:
        """Closes the client, if `from_url` made it."""
        if self._owns_client:
            await async_heartbeat_of(self.client).stop()
            await self.client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @classmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> redis.Redis:
        client: Any = redis.Redis
        return client.from_url(url, **{"retry": Retry(NoBackoff(), 0), **options})

    async def send(self, call: Call[T]) -> T:
        """Sends one call made by `calls`; what the operation's own method does.

        The same call can be sent again, by any store of the same prefix: it takes effect once.
        """
        if not self._watch:
            return await self._send(call)
        began = time.monotonic()
        try:
            result = await self._send(call)
        except Exception as error:
            self._watch.tell(call, error, time.monotonic() - began)
            raise
        self._watch.tell(call, result, time.monotonic() - began)
        return result

    async def _send(self, call: Call[T]) -> T:
        began = time.monotonic()
        try:
            return await self._send_once(call)
        except FAILURES as error:
            return await self._insist(lambda: self._send_once(call), Sending(call, began, self._patience), error)

    async def _send_once(self, call: Call[T]) -> T:
        if self._durability is not None and call.script.is_transition:
            return await self._send_and_wait(call)
        return call.answer(await self._execute(call))

    async def _execute(self, call: Call[Any]) -> Any:
        if isinstance(self.client, redis.RedisCluster):
            # Left to itself, redis-py lets many first calls each find out by a MOVED where their slot is.
            await self.client.initialize()
        if self._lender.lends():
            (reply,) = await self._lender.send(call.evalsha())
            if isinstance(reply, NoScriptError):
                (reply,) = await self._lender.send(call.eval())
            if isinstance(reply, ResponseError):
                raise reply
            return reply
        try:
            return await self._untyped_client.execute_command(*call.evalsha(), **OPTIONS)
        except NoScriptError:
            return await self._untyped_client.execute_command(*call.eval(), **OPTIONS)

    async def _send_and_wait(self, call: Call[T]) -> T:
        (reply,) = await self._send_to(await self._node(call), [call], load_scripts=False)
        if isinstance(reply, NoScriptError):
            (reply,) = await self._send_to(await self._node(call), [call])
        if isinstance(reply, AskError) and isinstance(self.client, redis.RedisCluster):
            # The slot is elsewhere, or on its way. redis-py knows to follow it, but not to wait on that connection.
            result = call.answer(await self._execute(call))
            (reply,) = await self._send_to(await self._node(call), [call])
            if isinstance(reply, AskError):
                raise wire.not_replicated(call, result, "its slot is moving to another node")
        return wire.read(call, reply)

    async def _insist(self, attempt: Callable[[], Awaitable[T]], sending: Sending, error: Exception) -> T:
        """Tries again until it succeeds, or `sending` raises what has become of it."""
        while True:
            await asyncio.sleep(sending.failed(error))
            try:
                return await attempt()
            except FAILURES as failure:
                error = failure

    async def _send_all(self, calls: Sequence[Call[Any]]) -> list[Any]:
        if not self._watch:
            return await self._send_batch(calls)
        began = time.monotonic()
        try:
            results = await self._send_batch(calls)
        except Exception as error:
            self._watch.tell_all(calls, [error] * len(calls), time.monotonic() - began)
            raise
        self._watch.tell_all(calls, results, time.monotonic() - began)
        return results

    async def _send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        sending = Sending(None, time.monotonic(), self._patience)
        try:
            results = await self._send_together(calls, sending)
        except FAILURES as error:
            results = await self._insist(lambda: self._send_together(calls, sending), sending, error)
        return [
            await self._resend(call, result.error, sending) if isinstance(result, Unsettled) else result
            for call, result in zip(calls, results, strict=True)
        ]

    async def _send_together(self, calls: Sequence[Call[Any]], sending: Sending) -> list[Any]:
        if self._durability is None and self._lender.lends():
            commands = wire.commands(calls)
            read = outcomes(calls, len(commands) - len(calls), sending.may_have_run)
            return (await self._lender.send(*commands, read=read))[-len(calls) :]  # each is read while the next is made
        is_one = isinstance(self.client, redis.Redis)
        replies = await self._send_to(self.client, calls) if is_one else await self._send_to_nodes(calls)
        return [outcome(call, reply, sending.may_have_run) for call, reply in zip(calls, replies, strict=True)]

    async def _send_to(self, client: Any, calls: Sequence[Call[Any]], *, load_scripts: bool = True) -> list[Any]:
        commands = wire.commands(calls, self._durability, load_scripts=load_scripts)
        if client is self.client and self._lender.lends():
            replies = await self._lender.send(*commands)
        elif isinstance(client, redis.Redis):
            pipeline: Any = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command, **OPTIONS)
            replies = await pipeline.execute(raise_on_error=False)
        else:
            sent = [_NodeCommand(command) for command in commands]
            await client.execute_pipeline(sent)
            replies = [command.result for command in sent]
        return wire.replies_to(calls, replies, self._durability)

    async def _send_to_nodes(self, calls: Sequence[Call[Any]]) -> list[Any]:
        replies: list[Any] = [None] * len(calls)
        nodes: dict[int, tuple[Any, list[int]]] = {}
        for index, call in enumerate(calls):
            node = await self._node(call)
            nodes.setdefault(id(node), (node, []))[1].append(index)

        async def send(node: Any, indexes: list[int]) -> None:
            try:
                answered = await self._send_to(node, [calls[index] for index in indexes])
            except UNANSWERED as error:
                answered = [error] * len(indexes)
            for index, reply in zip(indexes, answered, strict=True):
                replies[index] = reply

        await asyncio.gather(*(send(node, indexes) for node, indexes in nodes.values()))
        return replies

    async def _node(self, call: Call[Any]) -> Any:
        """What sends to the server that has the call's slot: the client, or a node of the cluster's."""
        if isinstance(self.client, redis.Redis):
            return self.client
        cluster: Any = await self.client.initialize()
        return cluster.nodes_manager.get_node_from_slot(cluster.keyslot(call.keys[0]))

    async def _resend(self, call: Call[Any], error: Exception, batch: Sending) -> Any:
        sending = Sending(call, batch.began, self._patience, may_have_run=batch.may_have_run)
        try:
            if isinstance(error, (NoScriptError, AskError)):  # it has not run, and a single call finds the way
                try:
                    return await self._send_once(call)
                except FAILURES as failure:
                    error = failure
            return await self._insist(lambda: self._send_once(call), sending, error)
        except Exception as failure:  # noqa: BLE001 -- each call of a batch answers for itself
            return failure


async def _carry_out(store: AsyncStepRunStore, plan: Plan[T]) -> T:
    """Does what a plan says."""
    try:
        wanted = next(plan)
        while True:
            answer: Any = None
            try:
                if isinstance(wanted, Call):
                    answer = await store.send(wanted)
                elif isinstance(wanted, list):
                    answer = await _ask(store.client, wanted)
                elif isinstance(wanted, Doze):
                    await _doze(store, wanted)
                elif isinstance(wanted, tuple):
                    answer = await store._send_all(wanted)  # pyright: ignore[reportPrivateUsage]: of this module
                else:
                    await asyncio.sleep(wanted)
            except Exception as error:  # noqa: BLE001 -- the plan knows which errors to bear
                wanted = plan.throw(error)
            else:
                wanted = plan.send(answer)
    except StopIteration as end:
        return end.value


async def _doze(store: AsyncStepRunStore, doze: Doze) -> None:
    longest = store._longest_read / 2  # pyright: ignore[reportPrivateUsage]: of this module
    client: Any = store.client
    try:
        await client.execute_command(*doze.command(longest))
    except RedisError:  # the next look will tell
        await asyncio.sleep(min(doze.seconds, 0.1))


async def _ask(client: Any, commands: list[Command]) -> dict[str, list[Any]]:
    """Sends commands to every server: by server, their replies or errors."""
    if isinstance(client, redis.RedisCluster):
        cluster: Any = await client.initialize()
        servers = {node.name: node for node in cluster.get_primaries()}
    else:
        servers = {"": client}
    return {name: [answer async for answer in _answers(server, commands)] for name, server in servers.items()}


async def _answers(server: Any, commands: list[Command]) -> AsyncIterator[Any]:
    unanswered: Exception | None = None
    for command in commands:
        try:
            yield unanswered or await server.execute_command(*command)
        except RedisError as error:
            yield error
            if isinstance(error, UNANSWERED):
                unanswered = error  # nor will it answer the rest


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
            await _carry_out(self.store, self._claiming())
            self._enter()
            self._task, self._has_cancelled = asyncio.current_task(), False
            if self._state == "held" and self._lease is not None:
                async_heartbeat_of(self.store.client).add(self)
        except SquidstepError:
            raise
        except BaseException:  # the task was cancelled: the work has not begun
            self._stop()
            with suppress(SquidstepError, TimeoutError):
                async with asyncio.timeout(PATIENCE_WHEN_CANCELLED):
                    await _carry_out(self.store, self._abandoning())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            missing = await _carry_out(self.store, self._leaving(error))
        finally:
            self._stop()
        if missing is not None:
            raise missing
        if self._has_cancelled and self._task is not None and self._loss is not None:
            others = self._task.uncancel()
            if isinstance(error, asyncio.CancelledError) and not others:
                if not isinstance(self._loss, StaleStepRunError):
                    raise self._loss
                await _carry_out(self.store, self._resolving())
                return True
        return False

    async def complete(self, output: Mapping[str, Any], *, schedule: StepInputs | None = None) -> StepRun:
        """Ends the claim with an output; returns and raises as `Claim.complete`."""
        return await _carry_out(self.store, self._completing(output, schedule))

    async def fail(self, error: Mapping[str, Any] | BaseException) -> StepRun:
        """Ends the claim with an error, see `fail_step`; otherwise as `complete`."""
        return await _carry_out(self.store, self._failing(error))

    async def release(self) -> StepRun:
        """Gives the claim back before the work took effect, see `release_step`; otherwise as `complete`."""
        return await _carry_out(self.store, self._releasing())

    def is_of_this_code(self, step_run: StepRun) -> bool:
        """Likewise; another task may inherit its context, and may well wait for it."""
        return self._task is asyncio.current_task() and super().is_of_this_code(step_run)

    def _tell(self) -> None:
        super()._tell()
        if self._cancels and self._task is not None:
            self._has_cancelled = self._task.cancel("the claim on the step was lost")

    def _stop(self) -> None:
        if self._lease is not None:
            async_heartbeat_of(self.store.client).discard(self)
        self._exit()
