"""A job that makes thousands of calls to the store while alarms raise exceptions in them."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from traceback import format_exception
from typing import Any, cast

from rq.timeouts import JobTimeoutException

from squidstep_redis import StepBusyError, StepStatus, UndecodablePayloadError, current_claim
from squidstep_redis.rq import busy, current_run, step, steps, store
from support.storm_length import StormLength

_doubled: Counter[int] = Counter()


def _double(number: int) -> int:
    _doubled[number] += 1
    return 2 * number


@step("double", run_id="storm-{number}")
def _call_step(number: int) -> int:
    return _double(number)


@steps(run_id="storm-of-{number}")
def _call_steps(number: int) -> int:
    return current_run().call("double", _double, number)


def _call_call(number: int) -> int:
    return current_run().call(f"double-{number}", _double, number)


@step("held", run_id="storm-held")
def _held(number: int) -> int:
    return number


def _call_busy(number: int) -> int:
    try:
        return _held(number)
    except StepBusyError as error:
        return 2 * error.current.input["number"] * number


def _call_get(number: int) -> int:
    step_run = store().get_step_run("storm-known", f"step-{number % 10}")
    assert step_run is not None
    return step_run.input["number"] + 2 * number - number % 10


def _call_begin(number: int) -> int:
    step_run = store().begin_step("storm-begun", f"step-{number}", {"number": number}).step_run
    return 2 * step_run.input["number"]


def _call_batch(number: int) -> int:
    own = store()
    calls = [own.calls.get_step_run("storm-known", f"step-{(number + index) % 10}") for index in range(3)]
    seen = [cast("Any", result).input["number"] for result in own.batch(calls)]
    return 2 * number if seen == [(number + index) % 10 for index in range(3)] else -1


INTERRUPTED: list[Callable[[int], int]] = [
    _call_step,
    _call_steps,
    _call_call,
    _call_busy,
    _call_get,
    _call_begin,
    _call_batch,
]
_ONCE = {_call_step, _call_steps, _call_call}


def storm(least: int, length: StormLength) -> dict[str, Any]:
    """Interrupts calls to the store at random moments, as RQ's job timeout does, and returns its findings.

    Args:
        least: the least number of interruptions.
        length: how long it goes on.
    """
    own, this_run = store(), current_run().id
    own.schedule_steps("storm-known", {f"step-{number}": {"number": number} for number in range(10)})
    own.begin_step("storm-held", "held", {"number": 1})
    seconds = {function: _time(function) for function in INTERRUPTED}
    connections = len(own.client.client_list())
    handler: Any = signal.getsignal(signal.SIGALRM)  # RQ's own
    raised = caught = 0
    interrupted: Counter[str] = Counter()
    wrong: list[str] = []

    def alarm(number: int, frame: Any) -> None:
        nonlocal raised
        raised += 1
        handler(number, frame)

    def wait_for_alarm() -> None:  # not in the `try` itself: Python 3.13 does not guard every jump there
        while raised <= number:
            pass

    ignored: list[str] = []

    def report_ignored(unraisable: Any) -> None:
        traceback = format_exception(unraisable.exc_value)
        ignored.append(f"ignored in {unraisable.object!r}: {''.join(traceback)}")

    sys.unraisablehook = report_ignored  # Python cannot raise what a handler raises in a destructor
    signal.signal(signal.SIGALRM, alarm)
    for number in length.rounds(least):
        function = INTERRUPTED[number % len(INTERRUPTED)]
        result: int | None = None
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.000_001, 1.4 * seconds[function]))
            result = function(number)
            wait_for_alarm()
        except JobTimeoutException:
            caught += 1
        except UndecodablePayloadError as error:
            wrong.append(f"{function.__name__}({number}) turned the alarm into another error: {error}")
        if result is None:
            interrupted[function.__name__] += 1
            result = function(number)
        if function in _ONCE:
            times = _doubled[number]
            if (function(number), _doubled[number]) != (2 * number, times):
                wrong.append(f"{function.__name__}({number}) was executed after it had returned")
        if result != 2 * number:
            wrong.append(f"{function.__name__}({number}) returned {result}")
        if (left := (current_claim(), current_run().id, busy._inside.get())) != (None, this_run, None):
            wrong.append(f"{function.__name__}({number}) left {left} behind")
            break
    return {
        "alarms": number + 1,
        "raised": raised,
        "caught": caught,
        "wrong": wrong,
        "ignored": ignored,
        "interrupted": interrupted,
        "more connections": len(own.client.client_list()) - connections,
        "held": [step for step, status in own.step_statuses(str(this_run)).items() if status is StepStatus.RUNNING],
    }


def _time(function: Callable[[int], int]) -> float:
    """Returns how many seconds a call takes: the least, because most alarms would come too late on a busy machine."""
    seconds: list[float] = []
    for number in range(-20, 0):
        start = time.perf_counter()
        function(number)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
