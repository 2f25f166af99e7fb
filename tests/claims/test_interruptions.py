"""Interruptions: signals and cancellations during a claim leave no step running."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from typing import Any, cast

import pytest
from support.claims import (
    DeclinedError,
    Worker,
    after_reply,
    asyncio_only,
    blocking_only,
    charge,
    decline,
    fakeredis_only,
    interrupted_seconds,
    is_busy,
    outcomes,
    real_server,
    until,
)
from support.internals import replace_client
from support.interruptions import SignalingClient, sigusr1_raises
from support.proxy import Fault, Proxy
from support.records import begun, stored
from support.storm_length import StormLength

from squidstep_redis import (
    AsyncStepRunStore,
    Call,
    Outcome,
    StepRunStore,
    StepStatus,
    current_claim,
)


class TestInterruptedAcquisition:
    """An interruption before the work begins leaves no claim behind and uses up no attempt."""

    def check_that_no_claim_is_left(self, others: StepRunStore) -> None:
        assert current_claim() is None
        assert [step_run.status for step_run in others.get_run("run")] in ([], [StepStatus.PENDING])
        assert begun(others.begin_step("run", "pay", {}, max_attempts=1, lease=60)).attempt <= 2

    @blocking_only
    @pytest.mark.parametrize("scheduled", [False, True])
    @pytest.mark.parametrize("moment", ["before", "after"])
    @pytest.mark.parametrize("error", [SystemExit(143), DeclinedError("stopped"), KeyboardInterrupt()], ids=repr)
    def test_signal_leaves_no_claim_behind(
        self, worker: Worker, others: StepRunStore, error: BaseException, moment: str, scheduled: bool
    ) -> None:
        if scheduled:
            others.schedule_step("run", "pay", {"amount": 7})
        replace_client(worker.store, SignalingClient(worker.store.client, moment))

        with sigusr1_raises(error), pytest.raises(type(error)) as caught:
            worker.execute(decline)

        assert caught.value is error
        assert not scheduled or stored(others).input == {"amount": 7}
        self.check_that_no_claim_is_left(others)

    @blocking_only
    @real_server
    def test_signal_while_awaiting_the_reply_releases_the_claim(
        self, proxied: tuple[Worker, Proxy], others: StepRunStore
    ) -> None:
        worker, proxy = proxied
        worker.execute(charge, "before")
        error = DeclinedError("stopped")

        with sigusr1_raises(error) as raised:

            def interrupt(reply: bytes) -> bytes:
                signal.pthread_kill(cast("int", threading.main_thread().ident), signal.SIGUSR1)
                assert raised.wait(30)
                return reply

            proxy.add_fault(Fault(reply=interrupt))
            with pytest.raises(DeclinedError) as caught:
                worker.execute(decline)

        assert caught.value is error
        assert stored(others).status is StepStatus.PENDING
        assert outcomes(others) == [Outcome.RELEASED]
        assert begun(others.begin_step("run", "pay", {}, max_attempts=1)).attempt == 2

    @blocking_only
    def test_signal_while_waiting_for_another_worker_changes_nothing(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=60))
        error = DeclinedError("stopped")

        after_reply(worker, is_busy, lambda: signal.raise_signal(signal.SIGUSR1))

        with sigusr1_raises(error), pytest.raises(DeclinedError):
            worker.execute(charge, on_busy="wait")

        assert stored(others) == holder

    @asyncio_only
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_cancellation_leaves_no_claim_behind(
        self, worker: Worker, others: StepRunStore, moment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store: AsyncStepRunStore = worker.plain_store
        send = store._transport.send

        async def main() -> None:
            async def send_and_cancel(call: Call[Any]) -> Any:
                monkeypatch.undo()
                result = await send(call) if moment == "after" else None
                task.cancel()
                await asyncio.sleep(0)
                return result

            monkeypatch.setattr(store._transport, "send", send_and_cancel)
            task = asyncio.create_task(store.run_step("run", "pay", decline, {}))
            with pytest.raises(asyncio.CancelledError):
                await task

        cast("asyncio.Runner", worker.runner).run(main())

        self.check_that_no_claim_is_left(others)

    @fakeredis_only
    @asyncio_only
    def test_cancellation_does_not_wait_for_an_unreachable_server(self, worker: Worker, others: StepRunStore) -> None:
        async def main() -> None:
            sent: list[Call[Any]] = []

            async def send(call: Call[Any]) -> None:
                sent.append(call)
                if len(sent) == 1:
                    task.cancel()
                await asyncio.Event().wait()

            worker.plain_store._transport.send = send
            task = asyncio.create_task(worker.plain_store.run_step("run", "pay", decline, {}))
            await asyncio.wait([task], timeout=30)
            assert (task.cancelled(), len(sent)) == (True, 2)

        with interrupted_seconds(0.01):
            cast("asyncio.Runner", worker.runner).run(main())

        self.check_that_no_claim_is_left(others)

    @asyncio_only
    def test_cancellation_at_any_point_leaves_no_running_step(
        self, worker: Worker, others: StepRunStore, storm_length: StormLength
    ) -> None:
        store: AsyncStepRunStore = worker.plain_store
        executed: list[str] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            executed.append(input["step"])
            return {}

        async def main() -> None:
            for number in storm_length.rounds(40):
                step = f"step-{number}"
                task = asyncio.create_task(store.run_step("run", step, work, {"step": step}))
                for _ in range(number % 40):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

        cast("asyncio.Runner", worker.runner).run(main())

        statuses = others.step_statuses("run")
        assert StepStatus.RUNNING not in statuses.values()
        for step, status in statuses.items():
            assert status in ((StepStatus.COMPLETED, StepStatus.FAILED) if step in executed else (StepStatus.PENDING,))


class TestInterruptedCompletion:
    """The interruption is raised. A completion that the server received takes effect; a cancelled task completes."""

    @blocking_only
    @pytest.mark.parametrize(("moment", "outcome"), [("before", Outcome.FAILED), ("after", Outcome.COMPLETED)])
    @pytest.mark.parametrize("error", [SystemExit(143), DeclinedError("stopped")], ids=repr)
    def test_signal_leaves_the_step_completed_or_failed(
        self, worker: Worker, others: StepRunStore, error: BaseException, moment: str, outcome: Outcome
    ) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            replace_client(worker.store, SignalingClient(worker.store.client, moment))
            return charge(input)

        with sigusr1_raises(error), pytest.raises(type(error)) as caught:
            worker.execute(work)

        assert caught.value is error
        assert outcomes(others) == [outcome]
        assert current_claim() is None

    @asyncio_only
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_cancellation_leaves_the_step_completed(self, worker: Worker, others: StepRunStore, moment: str) -> None:
        store: AsyncStepRunStore = worker.plain_store
        send = store._transport.send

        async def main() -> None:
            async def send_and_cancel(call: Call[Any]) -> Any:
                is_completion = call.script.name == "complete_step"
                if is_completion and moment == "before":
                    task.cancel()
                    await asyncio.sleep(0)
                result = await send(call)
                if is_completion:
                    task.cancel()
                    await asyncio.sleep(0)
                return result

            cast("Any", store)._transport.send = send_and_cancel
            task = asyncio.create_task(store.run_step("run", "pay", charge, {"amount": 1}))
            await asyncio.wait([task], timeout=30)
            assert task.cancelled()
            # A task that is cancelled twice does not wait for the completion, which continues in the background.
            await until(lambda: outcomes(others) == [Outcome.COMPLETED])

        cast("asyncio.Runner", worker.runner).run(main())
