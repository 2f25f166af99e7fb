"""Many workers, both stores, every fault at once: was all that they were answered possible?"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from servers import find_binary

from squidstep_redis import scripts

from .soak import soak

# What must not be in the scripts: a file, what stands there, what the broken store has in its place.
MUTANTS = {
    "the token is not checked": ("lib/record.lua", '(token == state.token or token == "")', "true"),
    "the lease is not looked at": ("begin_step.lua", "not remaining or remaining > 0", "false"),
    "a lease never ends": ("begin_step.lua", "not remaining or remaining > 0", "true"),
    "attempts are left out": (
        "begin_step.lua",
        "state.attempt = state.attempt + 1",
        "state.attempt = state.attempt + 2",
    ),
    "completions are ordered by time": (
        "complete_step.lua",
        'redis.call("ZADD", done, run.completed, step)',
        'redis.call("ZADD", done, math.floor(now_ms() / 250) * -1, step)',
    ),
    "a completion writes before it checks": (
        "complete_step.lua",
        "if holds(state, token) then",
        'redis.call("HSET", steps, "o" .. step, output)\nif holds(state, token) then',
    ),
    "a begin that is sent again is a second one": ("begin_step.lua", "if holds(state, token) then", "if false then"),
    "a completed step is executed again": (
        "begin_step.lua",
        "if state.status == COMPLETED then",
        "if state.status == COMPLETED and math.random(20) > 1 then",
    ),
}


@pytest.mark.servers("valkey", "redis-7", "redis-6")
def test_a_short_soak_is_linearizable(binary: Path, tmp_path: Path) -> None:
    verdict = soak(5, tmp_path, binary=binary)
    assert verdict.problems == []
    assert_thorough(verdict.counts)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_long_soak_is_linearizable(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    verdict = soak(request.config.getoption("--soak-seconds"), tmp_path, binary=find_binary("valkey"), seed=1)
    terminal = request.config.get_terminal_writer()
    for name, count in [*sorted(verdict.counts.items()), ("problems", len(verdict.problems))]:
        terminal.line(f"{count:>10,} {name}")
    assert verdict.problems == []
    assert_thorough(verdict.counts)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_store_is_caught(name: str, tmp_path: Path) -> None:
    file, right, wrong = MUTANTS[name]
    lua = tmp_path / "lua"
    shutil.copytree(scripts.directory(), lua)
    source = (lua / file).read_text("utf-8")
    assert source.count(right) == 1
    (lua / file).write_text(source.replace(right, wrong), "utf-8")
    # Some need a coincidence, such as a lost reply between two begins: it may take a few soaks.
    assert any(caught(lua, tmp_path / f"{seed}", seed) for seed in range(6))


def caught(lua: Path, directory: Path, seed: int) -> list[str]:
    directory.mkdir()
    return soak(6, directory, binary=find_binary("valkey"), lua=lua, seed=seed).problems


def assert_thorough(counts: Counter[str]) -> None:
    """That it all came about: a soak in which nothing happens shows nothing."""
    happened = ["begin: execute", "begin: busy", "begin: completed", "takeovers", "complete: done", "complete: stale"]
    happened += ["fail: stale", "extend: stale", "answers lost", "workers killed", "replies lost", "server restarted"]
    assert not [name for name in happened if not counts[name]]
