"""Harmless signals, and gevent, while a blocking call waits for the server: neither extends its timeout."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from support.servers import find_binary

from squidstep_redis import ServerError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.servers("valkey")

LATE = 20.0  # seconds; the server is silent for longer


@pytest.fixture
def silent_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server
        server.resume()


@pytest.fixture
def signals() -> Iterator[None]:
    """In the test, a signal arrives every 50 ms, more often than a read or a write times out."""
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    main, stopped = threading.main_thread().ident or 0, threading.Event()

    def send() -> None:
        while not stopped.wait(0.05):
            signal.pthread_kill(main, signal.SIGUSR2)

    sender = threading.Thread(target=send)
    sender.start()
    yield
    stopped.set()
    sender.join()
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("size", [10, 20_000_000], ids=["read", "write"])
def test_signals_do_not_extend_the_timeout(silent_server: EmbeddedServer, size: int) -> None:
    with StepRunStore.from_url(silent_server.url, timeout=1, max_payload_bytes=30_000_000) as store:
        store.get_run("run")
        call = store.calls.begin_step("run", "pay", {"x": "x" * size})
        silent_server.pause()
        alarm = threading.Timer(2 * LATE, silent_server.resume)
        alarm.start()
        began = time.monotonic()
        with pytest.raises(ServerError):
            store.send(call)
        seconds = time.monotonic() - began
        alarm.cancel()
        alarm.join()

    assert seconds < LATE


IN_A_GREENLET = """
from gevent import monkey
monkey.patch_all()
import sys, time
from squidstep_redis import ServerError, StepRunStore

store = StepRunStore.from_url(sys.argv[1], timeout=1)
store.get_run("run")
print("connected", flush=True)
sys.stdin.readline()
try:
    store.get_run("run")
except ServerError as error:
    print(type(error).__name__, flush=True)
"""


def test_timeout_ends_a_call_in_a_greenlet(silent_server: EmbeddedServer) -> None:
    command = [sys.executable, "-c", IN_A_GREENLET, silent_server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        silent_server.pause()
        try:
            output, _ = process.communicate("\n", timeout=2 * LATE)
        finally:
            process.kill()

    assert output == "OutcomeUnknownError\n"
