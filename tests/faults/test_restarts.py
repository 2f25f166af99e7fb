"""The server is killed and restarts: with the data of its AOF, or empty, and always without its scripts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.operations import mixed, seen
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import Level, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

from .kit import FLAVORS, Load, Stores, assert_loss_is_legal, stores_of

AOF = {
    "always": {"appendonly": "yes", "appendfsync": "always"},
    "everysec": {"appendonly": "yes", "appendfsync": "everysec"},
    "none": {"appendonly": "no"},
}

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


@contextlib.contextmanager
def running(binary: Path, aof: str) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=binary, port=0, options=AOF[aof]) as server:
        yield server


@pytest.mark.parametrize("aof", AOF)
def test_kill_under_load_loses_only_what_doctor_warned_of(binary: Path, aof: str) -> None:
    """With `everysec`, a kill usually loses nothing, but a busy disk can delay writes for up to two seconds."""

    @contextlib.contextmanager
    def connect(flavor: str) -> Iterator[StepRunStore]:
        with stores_of(flavor) as stores:
            yield stores.from_url(server.url, timeout=30)

    with running(binary, aof) as server, stores_of("blocking") as stores:
        store = stores.from_url(server.url)
        warned = {finding.check for finding in store.doctor().findings if finding.level is Level.WARNING}
        assert ("persistence" in warned) is (aof != "always")
        with Load(lambda flavor=flavor: connect(flavor) for flavor in FLAVORS) as load:
            before = list(load.completions)
            server.kill()
            killed = time.monotonic()
            server.start()
            load.wait_for_progress()

        lost = load.lost(store)
        assert load.errors == []  # every call was retried until the server was back
        assert_loss_is_legal(load, lost, killed)
        if aof == "always":
            assert lost == []
            assert load.forgotten == []
        elif aof == "everysec":
            assert [completion for completion in lost if completion.acknowledged < killed - 2] == []
        else:
            assert set(before) <= set(lost)


class TestNoScript:
    """A restart drops the scripts, as SCRIPT FLUSH does (`TestScriptFlush` in wire/test_script_flush.py)."""

    @pytest.fixture
    def server(self, binary: Path) -> Iterator[EmbeddedServer]:
        with running(binary, "always") as server:
            yield server

    @staticmethod
    def restart(server: EmbeddedServer) -> None:
        server.kill()
        server.start()

    def test_single_calls_work_after_a_restart(self, server: EmbeddedServer, stores: Stores) -> None:
        store = stores.from_url(server.url)
        claim = begun(store.begin_step("run", "pay", {}))
        self.restart(server)
        assert store.complete_step(claim, {"receipt": 7}).output == {"receipt": 7}
        self.restart(server)
        assert store.begin_step("run", "pay", {}).step_run.output == {"receipt": 7}
        assert len(store.attempts("run", "pay")) == 1

    def test_batch_works_after_a_restart(self, server: EmbeddedServer, stores: Stores) -> None:
        store, twin = (stores.from_url(server.url, prefix=prefix) for prefix in ("one", "two"))
        expected = twin.batch(mixed(twin, 40))
        assert store.get_run("run") == []
        self.restart(server)
        assert seen(store.batch(mixed(store, 40))) == seen(expected)

    @pytest.mark.parametrize("after", range(4))
    def test_restart_between_single_calls_runs_nothing_twice(
        self, server: EmbeddedServer, stores: Stores, after: int
    ) -> None:
        with Proxy((server.host, server.port)) as proxy:
            store = stores.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=30)
            assert store.get_run("run") == []
            proxy.clear()
            proxy.after(after, lambda: self.restart(server))
            claim = begun(store.begin_step("run", "pay", {}))
            store.complete_step(claim, {"receipt": 7})
            assert [attempt.number for attempt in store.attempts("run", "pay")] == [1]
            assert store.completed_steps("run") == ["pay"]

    @pytest.mark.parametrize("transaction", [True, False])
    def test_users_own_pipeline_works_after_a_restart(
        self, server: EmbeddedServer, stores: Stores, transaction: bool
    ) -> None:
        store = stores.from_url(server.url)
        pipeline: Any = store.client.pipeline(transaction=transaction)
        pipeline.set("own", "1")
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", {}))
        self.restart(server)
        replies = stores.wait(pipeline.execute())
        assert begun(began.result(replies)).attempt == 1
        assert replies[0] is True
