"""A thread beside that of a call: what the call waits for, and what it does if there can be no thread."""

from __future__ import annotations

import _thread
import asyncio
import threading
import time
from unittest import mock

import pytest
from support.servers import wait_until

from squidstep_redis.transport import helper as module
from squidstep_redis.transport.helper import Helper


def test_function_runs_in_another_thread_once() -> None:
    threads: list[str] = []
    helper = Helper("beside", lambda: threads.append(threading.current_thread().name))
    helper.wait()
    assert threads == ["beside"]
    assert helper.error is None


def test_error_of_the_function_is_kept() -> None:
    error = ValueError("of the function")

    def fail() -> None:
        raise error

    helper = Helper("beside", fail)
    helper.wait()
    assert helper.error is error


@pytest.mark.parametrize("error", [GeneratorExit, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_thread_ends_without_a_traceback(error: type[BaseException], capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error("secret")

    helper = Helper("beside", fail)
    helper.wait()
    wait_until(lambda: all(thread.name != "beside" for thread in threading.enumerate()))
    assert "secret" not in "".join(capfd.readouterr())


def test_caller_is_interrupted_if_it_runs_the_function() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with (
        mock.patch.object(_thread, "start_new_thread", side_effect=RuntimeError("can't start new thread")),
        pytest.raises(KeyboardInterrupt),
    ):
        Helper("beside", fail)


def test_waiting_ends_in_time_while_the_function_runs() -> None:
    released = threading.Event()
    helper = Helper("beside", released.wait)
    helper.wait(until=time.monotonic() + 0.05)
    assert helper.is_running
    released.set()
    helper.wait()
    assert not helper.is_running


def test_caller_runs_the_function_if_no_thread_starts() -> None:
    threads: list[threading.Thread] = []
    with mock.patch.object(_thread, "start_new_thread", side_effect=RuntimeError("can't start new thread")):
        helper = Helper("beside", lambda: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]
    assert not helper.is_running


def test_thread_that_never_begins_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_START_SECONDS", 0.05)
    with mock.patch.object(_thread, "start_new_thread"):
        helper = Helper("beside", int)
    helper.wait()
    assert not helper.is_running
