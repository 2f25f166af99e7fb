"""Replies are lost, or never come, and requests arrive late."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from support.backends import Bench, contents
from support.internals import shorten_pauses
from support.operations import perform, prepare, seen, state
from support.proxy import Proxy
from support.records import begun
from support.servers import wait_until

from squidstep_redis import NotSentError, OutcomeUnknownError, StepRun, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.scripts import directory, script

from .kit import Stores

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


def stores_like(bench: Bench) -> Stores:
    """Returns stores of the same flavor as the bench."""
    return Stores("asyncio" if bench.runner else "blocking", bench.runner)


class TestElevenLostReplies:
    """Eleven replies are lost: a client with ten retries gives up, but the store continues.

    `TestLostReplies` in wire/test_lost_replies.py loses one and three, of every operation, with the real pauses.
    """

    OPERATIONS = (
        *("schedule_step", "begin_step", "advance_step", "complete_step", "fail_step", "extend_claim", "release_step"),
        *("delete_run", "purge", "wait_for_step"),
    )

    @pytest.fixture(autouse=True)
    def short_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shorten_pauses(monkeypatch, 0.02)

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_result_is_the_same_and_takes_effect_once(self, bench: Bench, operation: str) -> None:
        twin = bench.store(prefix=f"{bench.prefix}-twin")
        expected = perform(twin, operation, prepare(bench, twin))
        with Proxy.to(bench.backend.raw) as proxy, stores_like(bench) as stores:
            store = stores.retrying(f"redis://127.0.0.1:{proxy.port}", 10, prefix=bench.prefix)
            claim = prepare(bench, store)
            proxy.clear()
            proxy.drop(11)

            result = perform(store, operation, claim)

            assert len(proxy.commands) >= 12
            assert seen(result) == seen(expected)
            assert state(store) == state(twin)

    def test_begin_on_from_url_client_survives_eleven_lost_replies(self, bench: Bench) -> None:
        with Proxy.to(bench.backend.raw) as proxy, stores_like(bench) as stores:
            store = stores.from_url(f"redis://127.0.0.1:{proxy.port}", prefix=bench.prefix, timeout=60)
            proxy.drop(11)

            claim = begun(store.begin_step("run", "pay", {}, lease=60))

            assert len(proxy.commands) >= 12
            assert [attempt.number for attempt in store.attempts("run", "pay")] == [1]
            assert store.complete_step(claim, {"receipt": 7}).output == {"receipt": 7}


@pytest.fixture
def server(binary: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=binary, port=0) as server:
        yield server


class TestLateRequests:
    """Delayed requests arrive after a takeover."""

    @pytest.fixture
    def scene(self, server: EmbeddedServer, stores: Stores) -> Iterator[Scene]:
        with Proxy((server.host, server.port)) as proxy, redis.Redis.from_url(server.url) as client:
            store = stores.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=1)
            others = stores.from_url(server.url)
            for path in directory().glob("*.lua"):
                client.script_load(script(path.stem).source)
            yield Scene(proxy, store, others, client)

    def test_late_copy_of_a_begin_changes_nothing(self, scene: Scene) -> None:
        """The second copy was granted the claim, which has been taken over since."""
        release = scene.proxy.hold_requests(script="begin_step")
        claim = begun(scene.store.begin_step("run", "pay", {}, lease=0.01))
        scene.assert_nothing_changes(claim, release)

    @pytest.mark.parametrize("operation", ["complete_step", "fail_step", "extend_claim", "release_step"])
    def test_late_calls_of_a_zombie_change_nothing(self, scene: Scene, operation: str) -> None:
        claim = begun(scene.store.begin_step("run", "pay", {}, lease=0.01))
        arguments = {"extend_claim": (claim, 60), "release_step": (claim,)}.get(operation, (claim, {"by": "zombie"}))
        release = scene.proxy.hold_requests(1_000, script=operation)
        with pytest.raises(OutcomeUnknownError):
            getattr(scene.store, operation)(*arguments)
        scene.proxy.heal()
        scene.assert_nothing_changes(claim, release)


@dataclass
class Scene:
    """A store behind a proxy, and a second store with a direct connection, as another worker has."""

    proxy: Proxy
    store: StepRunStore
    others: StepRunStore
    client: Any

    def assert_nothing_changes(self, claim: StepRun, release: threading.Event) -> None:
        """Checks that the late copies change nothing after another worker has taken over the step."""
        assert claim.lease_ends_at is not None
        end = claim.lease_ends_at.timestamp()
        wait_until(lambda: self.client.time()[0] + self.client.time()[1] / 1e6 >= end)
        winner = begun(self.others.begin_step("run", "pay", {}, lease=60))
        assert winner.attempt == 2
        before, ran = contents(self.client, "squidstep"), self.scripts_run()
        release.set()
        wait_until(lambda: self.scripts_run() > ran)
        assert contents(self.client, "squidstep") == before
        assert self.others.complete_step(winner, {"by": "winner"}).output == {"by": "winner"}

    def scripts_run(self) -> int:
        return self.client.info("commandstats")["cmdstat_evalsha"]["calls"]


class TestNoReply:
    """A server or a proxy accepts data and never replies."""

    @pytest.mark.parametrize("batch", [False, True])
    def test_one_deadline_limits_the_call(self, server: EmbeddedServer, stores: Stores, batch: bool) -> None:
        with Proxy((server.host, server.port)) as proxy:
            store = stores.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=1)
            assert store.get_run("run") == []  # connects
            proxy.clear()
            proxy.hold_requests(1_000)
            call = store.calls.begin_step("run", "pay", {})

            began = time.monotonic()
            with pytest.raises(OutcomeUnknownError, match="no reply within") as caught:
                _ = store.batch([call]) if batch else store.send(call)

            # redis-py's own timeout times its retries is half a minute.
            assert time.monotonic() - began < 20
            assert 1 < len(proxy.commands) <= 5  # each waits 0.3 s for a reply
            assert caught.value.transient
            proxy.heal()
            assert begun(store.send(call)).attempt == 1

    def test_client_with_ten_retries_is_called_at_most_twice(self, server: EmbeddedServer, stores: Stores) -> None:
        with Proxy((server.host, server.port)) as proxy:
            url = f"redis://127.0.0.1:{proxy.port}?socket_timeout=0.05"
            store = stores.retrying(url, 10, timeout=1)
            assert store.get_run("run") == []
            proxy.clear()
            proxy.hold_requests(1_000)

            with pytest.raises(OutcomeUnknownError):
                store.begin_step("run", "pay", {})

            # Two calls at most, because eleven timeouts take half of the deadline.
            assert 1 < len(proxy.commands) <= 22

    def test_call_to_a_paused_server_can_be_sent_again(self, server: EmbeddedServer, stores: Stores) -> None:
        store = stores.from_url(server.url, timeout=1)
        assert store.get_run("run") == []
        server.pause()
        with pytest.raises(OutcomeUnknownError) as caught:
            store.begin_step("run", "pay", {})
        server.resume()

        assert caught.value.call is not None
        assert begun(store.send(caught.value.call)).attempt == 1
        assert len(store.attempts("run", "pay")) == 1


def test_exhausted_pool_sends_nothing(server: EmbeddedServer, stores: Stores) -> None:
    with Proxy((server.host, server.port)) as proxy:
        store = stores.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=0.5, max_connections=1)
        assert store.get_run("run") == []
        client: Any = store.client
        pipeline = client.pipeline()
        stores.wait(pipeline.watch("key"))  # holds the only connection
        proxy.clear()

        with pytest.raises(NotSentError, match="nothing was sent"):
            store.begin_step("run", "pay", {})
        with pytest.raises(NotSentError, match="nothing was sent"):
            store.batch([store.calls.begin_step("run", "pay", {})])

        assert proxy.commands == []
        stores.wait(pipeline.reset())
        assert begun(store.begin_step("run", "pay", {})).attempt == 1
