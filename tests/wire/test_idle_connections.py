"""A forked child opens its own connection: two processes must never share one."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from support.backends import Bench
from support.internals import idle_connections
from support.servers import wait_until

from squidstep_redis import StepRunStore


@pytest.mark.servers("valkey", "redis-7", "redis-6")
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_forked_child_leaves_idle_connections_to_its_parent(bench: Bench) -> None:
    def connected() -> int:
        return sum(client["name"] == bench.prefix for client in bench.backend.raw.client_list())

    store = StepRunStore.from_url(bench.backend.url or "", prefix=bench.prefix, client_name=bench.prefix)
    with contextlib.closing(store):
        store.schedule_step("run", "pay", {})
        assert (connected(), idle_connections(store)) == (1, 1)

        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                store.get_run("run")
                signal.pause()  # it stays connected until it is killed
            os._exit(1)
        try:
            wait_until(lambda: connected() == 2)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

        assert [step_run.step for step_run in store.get_run("run")] == ["pay"]
