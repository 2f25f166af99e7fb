"""A process that executes steps while exceptions from outside interrupt them from its first call on.

What happens once in a process is interrupted, too: imports, the look-up of a host name, the start of the heartbeat. The
arguments are the port, the kind of the client, where the exceptions come from, and for how many seconds.

The process fails if, afterwards, a call hangs, the heartbeat does not run, a step is left running, or the pool has
lost a connection.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import random
import signal
import sys
import threading
import time
from typing import Any

import redis

from squidstep_redis import StepRunStore
from squidstep_redis.transport.pool import ask
from support.interruptions import OutsideError, raise_in

DATABASE = 3
_CONNECTIONS = 4
_AT_ONCE = 3
_numbers = itertools.count()


class _HookedRedis(redis.Redis):
    def execute_command(self, *args: Any, **options: Any) -> Any:
        return super().execute_command(*args, **options)


def _store(kind: str, port: int) -> StepRunStore:
    url = f"redis://localhost:{port}/{DATABASE}"
    if kind == "own":
        return StepRunStore.from_url(url)
    # While it sets up a connection with RESP3, redis-py uses logging, whose lock an exception may leave held.
    url = f"{url}?protocol=2"
    if kind == "blocking pool":
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=5, socket_timeout=2)
        return StepRunStore(redis.Redis(connection_pool=pool))
    client = _HookedRedis if kind == "hooked" else redis.Redis
    return StepRunStore(client.from_url(url, max_connections=_CONNECTIONS, socket_timeout=2))


def _execute_until(end: float, store: StepRunStore) -> None:
    while time.monotonic() < end:
        with contextlib.suppress(OutsideError):
            while time.monotonic() < end:
                store.run_step("run", f"step-{next(_numbers)}", dict, {}, lease=60)


def _in_threads(end: float, store: StepRunStore) -> None:
    def execute() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OutsideError):
                _execute_until(end, store)

    threads = [threading.Thread(target=execute, daemon=True) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        raise_in(random.choice(threads))
        time.sleep(random.uniform(0, 0.004))
    for thread in threads:
        thread.join()


def _in_the_main_thread(end: float, store: StepRunStore, number: signal.Signals) -> None:
    is_armed = False

    def interrupt(*_: object) -> None:
        if is_armed:
            raise OutsideError

    def send_signals() -> None:
        while time.monotonic() < end:
            time.sleep(random.uniform(0, 0.004))
            signal.pthread_kill(main_thread, number)

    main_thread = threading.main_thread().ident or 0
    signal.signal(number, interrupt)
    threading.Thread(target=send_signals, daemon=True).start()
    while time.monotonic() < end:
        with contextlib.suppress(OutsideError):
            is_armed = True
            _execute_until(end, store)
        is_armed = False
    time.sleep(0.1)


def _has_all(pool: Any) -> bool:
    """Whether all connections of the pool can be taken at the same time."""
    taken: list[Any] = []
    try:
        while len(taken) < _CONNECTIONS:
            taken.append(ask(pool))
    except redis.ConnectionError:
        return False
    finally:
        for connection in taken:
            pool.release(connection)
    return True


def _check(store: Any, kind: str) -> None:
    with store.claim_step("run", "after", {}, lease=0.5) as claim:
        before, until = claim.step_run.lease_ends_at, time.monotonic() + 20
        while store.get_step_run("run", "after").lease_ends_at == before:
            assert time.monotonic() < until, "the heartbeat does not run"
            time.sleep(0.05)
        claim.complete({})
    while running := [step for step, status in store.step_statuses("run").items() if status == "running"]:
        assert time.monotonic() < until, f"left running: {running}"
        time.sleep(0.05)
    if kind in ("plain", "blocking pool"):  # a hooked client takes its connections itself
        pool = store.client.connection_pool
        while not _has_all(pool):  # a thread of the store may still hold one
            assert time.monotonic() < until, "the pool has lost a connection"
            time.sleep(0.05)


def main() -> None:
    """Executes steps under exceptions, and checks the process."""
    port, kind, source, seconds = sys.argv[1:]
    sys.unraisablehook = lambda _: None  # of exceptions in finalizers
    threading.excepthook = lambda _: None
    faulthandler.dump_traceback_later(float(seconds) + 60, exit=True)
    store = _store(kind, int(port))
    end = time.monotonic() + float(seconds)
    if source == "thread":
        _in_threads(end, store)
    else:
        _in_the_main_thread(end, store, signal.Signals[source])
    _check(store, kind)
    os._exit(0)  # what the finalizers of interrupted connections say does not matter


if __name__ == "__main__":
    main()
