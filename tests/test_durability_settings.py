"""`wait_replicas` and `wait_aof`: what a transition asks the server for, and when that is confirmed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis import exceptions
from support.backends import Bench
from support.servers import find_binary, wait_until

from squidstep_redis import NotReplicatedError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.settings import StoreSettings, check_settings
from squidstep_redis.transport.batch import Durability
from squidstep_redis.transport.client import ClientFacts

KEY = b"squidstep:{c0}:run:steps"
WRITTEN = True  # the reply to the mark
CLIENT = ClientFacts(False, None, None, sends=1, decodes=False, reuses_dirty_connections=False, retry_pauses=0)


def durability(settings: StoreSettings) -> Durability:
    """Returns what a store with these settings waits for."""
    checked = check_settings(settings, CLIENT).durability
    assert checked is not None
    return checked


@pytest.mark.parametrize(
    ("settings", "waits"),
    [
        ({"wait_replicas": 2}, [(b"WAIT", b"2", b"1000")]),
        ({"wait_aof": True}, [(b"WAITAOF", b"1", b"0", b"1000")]),
        (
            {"wait_replicas": 3, "wait_aof": True, "wait_timeout": 0.25},
            [(b"WAIT", b"3", b"250"), (b"WAITAOF", b"1", b"0", b"250")],
        ),
    ],
)
def test_settings_become_commands_after_the_mark(settings: Any, waits: list[Any]) -> None:
    mark, *commands = durability(settings).commands(KEY)

    assert mark[0] == b"SET"
    assert commands == waits


@pytest.mark.parametrize("settings", [{}, {"wait_replicas": 0}, {"wait_aof": False}, {"wait_timeout": 5}])
def test_without_replicas_and_aof_nothing_is_waited_for(settings: Any) -> None:
    assert check_settings(settings, CLIENT).durability is None


class TestReplies:
    @pytest.mark.parametrize("confirmed", [2, 3])
    def test_enough_replicas_confirm_it(self, confirmed: int) -> None:
        assert durability({"wait_replicas": 2}).unmet([WRITTEN, confirmed]) is None

    @pytest.mark.parametrize("confirmed", [0, 1])
    def test_fewer_replicas_do_not_confirm_it(self, confirmed: int) -> None:
        problem = f"{confirmed} of 2 replicas confirmed it within 1000 ms"
        assert durability({"wait_replicas": 2}).unmet([WRITTEN, confirmed]) == (problem, confirmed)

    def test_aof_on_disk_confirms_it(self) -> None:
        assert durability({"wait_aof": True}).unmet([WRITTEN, [1, 0]]) is None

    def test_aof_that_is_not_on_disk_does_not_confirm_it(self) -> None:
        problem = "the AOF was not on disk within 1000 ms"
        assert durability({"wait_aof": True}).unmet([WRITTEN, [0, 2]]) == (problem, None)

    def test_both_must_confirm_it(self) -> None:
        both = durability({"wait_replicas": 1, "wait_aof": True})
        assert both.unmet([WRITTEN, 1, [1, 0]]) is None
        assert both.unmet([WRITTEN, 0, [1, 0]]) == ("0 of 1 replicas confirmed it within 1000 ms", 0)
        assert both.unmet([WRITTEN, 1, [0, 0]]) == ("the AOF was not on disk within 1000 ms", 1)

    def test_error_of_the_server_does_not_confirm_it(self) -> None:
        refused = exceptions.ResponseError("WAITAOF cannot be used when appendonly is disabled")
        unmet = durability({"wait_aof": True}).unmet([WRITTEN, refused])
        assert unmet == (f"WAITAOF failed: {refused}", None)

    def test_refused_marker_does_not_confirm_it(self) -> None:
        refused = exceptions.NoPermissionError("this user has no permissions to run the 'set' command")
        unmet = durability({"wait_replicas": 1, "wait_aof": True}).unmet([refused, 1, [1, 0]])
        assert unmet == (f"SET of the marker failed: {refused}", None)


@pytest.fixture(scope="module")
def primary() -> Iterator[EmbeddedServer]:
    """A server with one replica, and with an AOF that it does not write to disk by itself."""
    options = {"repl-diskless-sync-delay": "0", "appendonly": "yes", "appendfsync": "no"}
    valkey = find_binary("valkey")
    with (
        EmbeddedServer(binary=valkey, port=0, options=options) as primary,
        EmbeddedServer(binary=valkey, port=0) as replica,
        redis.Redis.from_url(replica.url) as client,
    ):
        client.replicaof(primary.host, primary.port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", 30)
        yield primary


@pytest.mark.servers("valkey")
class TestServers:
    @pytest.mark.parametrize(
        ("settings", "problem", "replicas"),
        [
            ({"wait_replicas": 2}, "1 of 2 replicas confirmed it within 500 ms", 1),
            ({"wait_aof": True}, "the AOF was not on disk within 500 ms", None),
        ],
        ids=["replicas", "aof"],
    )
    def test_transition_that_is_not_confirmed_raises(
        self, bench: Bench, primary: EmbeddedServer, settings: Any, problem: str, replicas: int | None
    ) -> None:
        with contextlib.closing(bench.from_url(primary.url, wait_timeout=0.5, **settings)) as store:
            with pytest.raises(NotReplicatedError, match=problem) as single:
                store.schedule_step("run", "single", {})
            batched = store.batch([store.calls.begin_step("run", step, {}) for step in ("a", "b")])

        errors = [error for error in batched if isinstance(error, NotReplicatedError)]
        assert [error.replicas for error in (single.value, *errors)] == [replicas] * 3
        assert [error.result.step_run.step for error in errors] == ["a", "b"]

    def test_transition_whose_marker_is_refused_is_not_confirmed(self, bench: Bench, primary: EmbeddedServer) -> None:
        """Without the marker, a re-sent call that writes nothing would wait for the writes before it."""
        with redis.Redis.from_url(primary.url) as admin:
            admin.execute_command("ACL", "SETUSER", "no-set", "reset", "on", ">secret", "~*", "&*", "+@all", "-set")
        url = primary.url.replace("redis://", "redis://no-set:secret@")
        with (
            contextlib.closing(bench.from_url(url, wait_replicas=1, timeout=60)) as store,
            pytest.raises(NotReplicatedError, match="SET of the marker failed") as caught,
        ):
            store.begin_step("run", "pay", {})
        assert caught.value.result.decision == "execute"

    def test_transition_that_the_replica_has_is_confirmed(self, bench: Bench, primary: EmbeddedServer) -> None:
        with contextlib.closing(bench.from_url(primary.url, wait_replicas=1, timeout=60, wait_timeout=10)) as store:
            assert store.schedule_step("run", "pay", {}).decision == "schedule"
        with StepRunStore.from_url(primary.url, prefix=bench.prefix) as reader:
            assert reader.step_statuses("run") == {"pay": "pending"}
