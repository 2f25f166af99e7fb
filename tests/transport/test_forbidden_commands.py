"""A server that has renamed or forbidden the script commands: the error says that nothing was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from support.backends import Bench
from support.proxy import Proxy
from support.records import begun
from support.servers import find_binary

from squidstep_redis import OutcomeUnknownError, RefusedError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from transport.conftest import Connect

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


@pytest.fixture
def renamed(bench: Bench, tmp_path: Path) -> Iterator[Callable[[str], EmbeddedServer]]:
    """Starts a server without a command."""
    servers: list[EmbeddedServer] = []

    def start(command: str) -> EmbeddedServer:
        config, launcher = tmp_path / "server.conf", tmp_path / "server"
        config.write_text(f'rename-command {command} ""\n')
        launcher.write_text(f'#!/bin/sh\nexec "{find_binary(bench.backend.name)}" "{config}" "$@"\n')
        launcher.chmod(0o700)
        servers.append(EmbeddedServer(binary=launcher, port=0))
        return servers[-1].__enter__()

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def check_refused(store: StepRunStore, *advice: str) -> None:
    call = store.calls.begin_step("run", "pay", {})
    with pytest.raises(RefusedError, match="nothing was written") as caught:
        store.send(call)
    results: list[Any] = [caught.value, *store.batch([call, call])]
    for error in results:
        assert type(error) is RefusedError
        assert not error.transient
        assert all(word in str(error) for word in advice)


@pytest.mark.parametrize("command", ["EVAL", "EVALSHA"])
def test_renamed_script_command_is_refused(
    connect_to: Connect, renamed: Callable[[str], EmbeddedServer], kind: str, command: str
) -> None:
    server = renamed(command)
    store = connect_to(kind, server.port or 0, timeout=1)
    if command == "EVALSHA":
        check_refused(store, "EVALSHA", "renamed")
    else:
        with pytest.raises(RefusedError, match="nothing was written.*renamed"):
            store.begin_step("run", "pay", {})
    with redis.Redis(port=server.port) as admin:
        assert admin.dbsize() == 0


def test_renamed_script_load_is_not_needed(
    connect_to: Connect, renamed: Callable[[str], EmbeddedServer], kind: str
) -> None:
    store = connect_to(kind, renamed("SCRIPT").port or 0, timeout=1)
    results: list[Any] = store.batch([store.calls.begin_step(f"run-{number}", "pay", {}) for number in range(3)])
    assert [begun(result).attempt for result in results] == [1, 1, 1]


@pytest.mark.parametrize("forbidden", ["-@scripting", "-evalsha"])
def test_script_command_forbidden_by_an_acl_is_refused(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, forbidden: str
) -> None:
    raw = bench.backend.raw
    raw.execute_command(f"ACL SETUSER limited reset on >secret ~* +@all {forbidden}")
    try:
        store = connect_to(kind, proxy.port, client={"username": "limited", "password": "secret"}, timeout=1)
        check_refused(store, "permission", "grant the user")
    finally:
        raw.execute_command("ACL DELUSER limited")
    assert bench.dump() == {}


def test_command_renamed_within_a_script_is_not_a_refusal(
    connect_to: Connect, renamed: Callable[[str], EmbeddedServer]
) -> None:
    """The script had written before it called the unknown command: its error must not say otherwise."""
    server = renamed("PEXPIREAT")
    store = connect_to("own", server.port or 0, timeout=0.3, run_ttl=60)
    with pytest.raises(OutcomeUnknownError):
        store.schedule_step("run", "pay", {})
