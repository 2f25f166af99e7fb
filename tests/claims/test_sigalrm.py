"""SIGALRM, with which RQ makes its timeouts: it is deferred while a claim is acquired or ended."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import (
    DeclinedError,
    Worker,
    after_reply,
    blocking_only,
    charge,
    connected,
    decline,
    end,
    is_busy,
    outcomes,
    real_server,
)
from support.internals import idle_connections
from support.interruptions import AlarmError
from support.records import begun, stored
from support.servers import wait_until
from support.storm_length import StormLength

from squidstep_redis import (
    MsgpackCodec,
    Outcome,
    StepRunStore,
    StepStatus,
    current_claim,
)
from squidstep_redis.signals import defer_sigalrm


@pytest.mark.timeout(method="thread")  # the other method uses SIGALRM itself
class TestDeferSigalrm:
    def test_alarm_is_delivered_after_the_block(self, alarms: list[int]) -> None:
        delivered_within: list[int] = []

        def raise_twice() -> None:
            for _ in range(2):
                signal.raise_signal(signal.SIGALRM)
                delivered_within.append(len(alarms))

        with pytest.raises(AlarmError), defer_sigalrm():
            raise_twice()

        assert (delivered_within, len(alarms)) == ([0, 0], 1)  # as usual with signals, two at once are delivered once
        with pytest.raises(AlarmError):
            signal.raise_signal(signal.SIGALRM)

    def test_exception_of_the_block_becomes_the_context(self, alarms: list[int]) -> None:
        def alarm_and_raise() -> None:
            signal.raise_signal(signal.SIGALRM)
            raise DeclinedError

        with pytest.raises(AlarmError) as caught, defer_sigalrm():
            alarm_and_raise()

        assert isinstance(caught.value.__context__, DeclinedError)

    def test_block_without_an_alarm_restores_the_handler(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        with defer_sigalrm():
            pass

        assert signal.getsignal(signal.SIGALRM) is handler
        assert alarms == []

    def test_nested_block_defers_to_the_end_of_the_outer(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)
        delivered_within: list[int] = []

        def alarm_in_a_nested_block() -> None:
            with defer_sigalrm():
                signal.raise_signal(signal.SIGALRM)
            delivered_within.append(len(alarms))

        with pytest.raises(AlarmError), defer_sigalrm():
            alarm_in_a_nested_block()

        assert (delivered_within, len(alarms)) == ([0], 1)
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_alarm_is_delivered_during_sleep(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        with defer_sigalrm() as alarm:
            signal.raise_signal(signal.SIGALRM)
            with pytest.raises(AlarmError):
                alarm.sleep(60)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(AlarmError):
                alarm.sleep(60)
            alarm.sleep(0)

        assert len(alarms) == 2
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_handler_set_meanwhile_stays(self, alarms: list[int]) -> None:
        received: list[int] = []

        def another(number: int, frame: object) -> None:
            received.append(number)

        with defer_sigalrm():
            signal.signal(signal.SIGALRM, another)
            signal.raise_signal(signal.SIGALRM)

        assert signal.getsignal(signal.SIGALRM) is another
        assert (len(received), alarms) == (1, [])

    @pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
    def test_block_without_a_handler_does_nothing(self, alarms: list[int], handler: signal.Handlers) -> None:
        signal.signal(signal.SIGALRM, handler)

        with defer_sigalrm():
            assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_block_in_another_thread_does_nothing(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        def handler_in_the_block() -> object:
            with defer_sigalrm():
                return signal.getsignal(signal.SIGALRM)

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(handler_in_the_block).result() is handler


class AlarmingCodec:
    """A codec that raises SIGALRM during its first decoding."""

    def __init__(self) -> None:
        self.codec = MsgpackCodec()
        self.has_alarmed = False

    def encode(self, payload: dict[str, Any]) -> bytes:
        return self.codec.encode(payload)

    def decode(self, data: bytes) -> dict[str, Any]:
        if not self.has_alarmed:
            self.has_alarmed = True
            signal.raise_signal(signal.SIGALRM)
        return self.codec.decode(data)


@pytest.fixture
def no_garbage_is_collected() -> Iterator[None]:
    """An exception of a signal handler in a finalizer or in a callback of the collector (hypothesis has one) is lost.

    No library can prevent that, so the collector is off.
    """
    gc.disable()
    yield
    gc.enable()


@blocking_only
@pytest.mark.timeout(method="thread")  # the other method uses SIGALRM itself
class TestAlarmDuringAClaim:
    @pytest.mark.parametrize("ending", ["complete", "fail", "release"])
    def test_alarm_never_interrupts_an_ending(
        self, worker: Worker, others: StepRunStore, alarms: list[int], ending: str
    ) -> None:
        with worker.claim() as claim:
            after_reply(worker, lambda _: True, lambda: signal.raise_signal(signal.SIGALRM))
            with pytest.raises(AlarmError):
                end(claim, ending)

        expected = {"complete": Outcome.COMPLETED, "fail": Outcome.FAILED, "release": Outcome.RELEASED}
        assert (outcomes(others), len(alarms)) == ([expected[ending]], 1)
        assert current_claim() is None

    def test_alarm_during_acquisition_releases_the_claim(
        self, worker: Worker, others: StepRunStore, alarms: list[int]
    ) -> None:
        after_reply(worker, lambda _: True, lambda: signal.raise_signal(signal.SIGALRM))

        with pytest.raises(AlarmError):
            worker.execute(decline)

        assert (outcomes(others), len(alarms)) == ([Outcome.RELEASED], 1)
        assert current_claim() is None

    def test_alarm_during_the_work_is_recorded_as_failure(
        self, worker: Worker, others: StepRunStore, alarms: list[int]
    ) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            threading.Event().wait(60)
            return {}

        with pytest.raises(AlarmError):
            worker.execute(work)

        assert outcomes(others) == [Outcome.FAILED]
        assert cast("Any", stored(others).last_error)["type"].endswith("AlarmError")

    @pytest.mark.parametrize("executed", [False, True])
    def test_alarm_during_decoding_is_not_a_codec_error(
        self, bench: Bench, others: StepRunStore, alarms: list[int], executed: bool
    ) -> None:
        if executed:
            others.run_step("run", "pay", charge, {"amount": 1})

        with pytest.raises(AlarmError):
            Worker(bench, bench.store(codec=AlarmingCodec())).execute(charge)

        assert len(alarms) == 1

    def test_alarm_ends_the_wait_for_another_worker(
        self, worker: Worker, others: StepRunStore, alarms: list[int]
    ) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=60))

        def release_and_set_the_alarm() -> None:
            others.release_step(holder)
            signal.setitimer(signal.ITIMER_REAL, 0.01)

        after_reply(worker, is_busy, release_and_set_the_alarm)

        with pytest.raises(AlarmError):
            worker.execute(charge, on_busy="wait")

        assert outcomes(others) == [Outcome.RELEASED]  # by the holder; not claimed since

    @real_server
    def test_alarms_at_random_moments_corrupt_nothing_and_leak_no_connection(
        self,
        bench: Bench,
        others: StepRunStore,
        alarms: list[int],
        no_garbage_is_collected: None,
        storm_length: StormLength,
    ) -> None:
        dice = random.Random(7_000)
        path = bench.backend.raw.connection_pool.connection_kwargs["path"]
        outputs: dict[int, dict[str, Any]] = {}
        with connected(bench, f"unix://{path}", client_name=bench.prefix) as worker:
            for number in storm_length.rounds(700):
                with contextlib.suppress(AlarmError):
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.000_01, 0.000_8))
                    input = {"number": number}
                    outputs[number] = worker.store.run_step(f"run-{number % 100}", f"{number}", dict, input, lease=0.5)
                    wait_until(lambda: len(alarms) > number)  # noqa: B023 -- called immediately
            total = len(alarms)
            assert total == number + 1

            found = {int(each.step): each for run in range(100) for each in others.get_run(f"run-{run}")}
            assert [each for each in found.values() if each.status is StepStatus.RUNNING] == []
            interrupted = [number for number in range(total) if number not in outputs]
            assert len(interrupted) > total / 14
            assert all(outputs[number] == {"number": number} == found[number].output for number in outputs)
            for number in interrupted[::10]:
                input = {"number": number}
                assert worker.store.run_step(f"run-{number % 100}", f"{number}", dict, input) == input

            assert idle_connections(worker.plain_store) <= 1
            clients = bench.backend.raw.client_list()
            assert (
                len([client for client in clients if client["name"] == bench.prefix]) <= 2
            )  # one more for the heartbeat
