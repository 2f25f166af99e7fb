"""Three scripts begin with a common case. Without the common case, they have the same effects and replies."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from hashlib import sha1
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import contents, timeless

from squidstep_redis import SquidstepError
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.model import BeginResult, StepRun, step_run_id
from squidstep_redis.operations import waiting
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol import arguments, scripts
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.scripts import Script

COMMON_CASE = re.compile(r"^-- The common case.*?(?=^-- include record)", re.MULTILINE | re.DOTALL)
WITH_COMMON_CASE = ("begin_step", "complete_step", "advance_step")

CALLS = Calls("squidstep", None, 10_000, None)
OF_EXPIRING_RUNS = Calls("squidstep", None, 10_000, 600)
KEYS = CALLS.keys.run("run").keys


def without_common_case(name: str, tmp_path_factory: pytest.TempPathFactory) -> Script:
    """Builds a script without its common case."""
    lua = tmp_path_factory.mktemp("lua")
    (lua / "lib").symlink_to(scripts.directory() / "lib")
    text, cut = COMMON_CASE.subn("", (scripts.directory() / f"{name}.lua").read_text("utf-8"))
    assert cut == 1
    (lua / f"{name}.lua").write_text(text, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "directory", lambda: lua)
        made = scripts.script.__wrapped__(name)
    assert made.sha == sha1(made.source, usedforsecurity=False).hexdigest().encode() != scripts.script(name).sha
    return made


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Call[Any]], Call[Any]]:
    """Converts a call to the same call of a script without its common case."""
    plain = {name: without_common_case(name, tmp_path_factory) for name in WITH_COMMON_CASE}
    return lambda call: call._replace(script=plain.get(call.script.name, call.script))


@pytest.fixture(scope="module")
def databases(binary: Any) -> Iterator[tuple[redis.Redis, redis.Redis]]:
    """Two databases of one server, so that both scripts find the same keys."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(binary=binary, port=0))
        first, second = (redis.Redis(host=server.host, port=server.port, db=db, protocol=2) for db in (0, 1))
        yield stack.enter_context(first), stack.enter_context(second)


STEPS = st.sampled_from(["a", "b"])
LEASES = st.sampled_from([None, 60])
LIMITS = st.sampled_from([None, 1, 2])
PAYLOADS = st.sampled_from([{"n": 1}, {"n": 2}])
PRINTS = st.sampled_from([None, None, None, True])
STORES = st.sampled_from([CALLS, OF_EXPIRING_RUNS])
LABELS = st.sampled_from([None, None, {"tenant": "acme"}])
OPERATIONS = st.one_of(
    st.tuples(st.just("begin"), STEPS, PAYLOADS, LEASES, LIMITS, PRINTS, STORES, LABELS),
    st.tuples(st.just("advance"), st.integers(0, 3), PAYLOADS, STEPS | st.just("c"), PAYLOADS, LEASES, LIMITS, PRINTS),
    st.tuples(st.just("complete"), st.integers(0, 3), PAYLOADS, st.sampled_from([None, {"c": {}}])),
    st.tuples(st.just("complete by id"), STEPS, PAYLOADS),
    st.tuples(st.sampled_from(["release", "fail", "expire", "checkpoint"]), st.integers(0, 3)),
    st.tuples(st.just("schedule"), STEPS, PAYLOADS),
    st.tuples(st.just("wait"), STEPS),
    st.tuples(st.sampled_from(["again", "ttl", "delete", "cancel", "resume"])),
    st.tuples(st.just("spoil"), st.sampled_from([0, 1, 2, 3]), st.sampled_from(["gone", "string"])),
)


def call_of(operation: tuple[Any, ...], claims: list[StepRun], sent: list[Call[Any]]) -> Call[Any] | None:
    kind, *rest = operation
    if kind == "begin":
        step, payload, lease, limit, printed, calls, labels = rest
        options: dict[str, Any] = {"lease": lease, "max_attempts": limit, "owner": "worker-1", "fingerprint": printed}
        return calls.begin_step("run", step, payload, labels=labels, **options)
    if kind == "schedule":
        return CALLS.schedule_step("run", *rest)
    if kind == "complete by id":
        step, payload = rest
        return CALLS.complete_step(step_run_id("squidstep", "run", step), payload)
    of_run: dict[str, Callable[[], Call[Any]]] = {
        "ttl": lambda: CALLS.expire_run("run", 60),
        "delete": lambda: CALLS.delete_run("run"),
        "cancel": lambda: CALLS.cancel_run("run", "stop"),
        "resume": lambda: CALLS.resume_run("run"),
    }
    if kind in of_run:
        return of_run[kind]()
    if kind == "wait":
        return waiting._await_step(CALLS, CALLS.keys.run("run"), arguments.step(rest[0]))
    if kind == "again":
        return sent[-1] if sent else None
    if not claims:
        return None
    claim = claims[-1 - rest[0] % len(claims)]  # also an earlier one
    if kind == "complete":
        return CALLS.complete_step(claim, rest[1], schedule=rest[2])
    if kind == "advance":
        output, step, payload, lease, limit, printed = rest[1:]
        if step == claim.step:
            return None
        options: dict[str, Any] = {"lease": lease, "max_attempts": limit, "owner": "worker-1", "fingerprint": printed}
        return CALLS.advance_step(claim, output, step, payload, **options)
    others: dict[str, Callable[[], Call[Any]]] = {
        "release": lambda: CALLS.release_step(claim),
        "fail": lambda: CALLS.fail_step(claim, {"why": "test"}),
        "expire": lambda: CALLS.expire_claim(claim),
        "checkpoint": lambda: CALLS.checkpoint_step(claim, {"done": rest[0]}),
    }
    return others[kind]()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=12))
def test_the_common_case_has_the_effects_of_the_general_path(
    databases: tuple[redis.Redis, redis.Redis],
    general: Callable[[Call[Any]], Call[Any]],
    operations: list[tuple[Any, ...]],
) -> None:
    for database in databases:
        database.flushall()
    claims: list[StepRun] = []
    sent: list[Call[Any]] = []
    for operation in operations:
        if operation[0] == "spoil":
            for database in databases:
                database.delete(KEYS[operation[1]])
                if operation[2] == "string":
                    database.set(KEYS[operation[1]], "other")
            continue
        call = call_of(operation, claims, sent)
        if call is None:
            continue
        sent.append(call)
        sent_calls = zip(databases, (call, general(call)), strict=True)
        common, full = (database.execute_command(*each.eval()) for database, each in sent_calls)
        common, full = (reply.split(b" ", 2) if isinstance(reply, bytes) else reply for reply in (common, full))
        if common[0] == b"busy":
            del common[7], full[7]  # the rest of the lease
        assert timeless(common) == timeless(full)
        ours, theirs = (contents(database, "squidstep") for database in databases)
        assert timeless(ours) == timeless(theirs)
        for key in ours:
            lifetimes = [database.pttl(key) for database in databases]
            assert max(lifetimes) - min(lifetimes) < 60_000, key  # -1 if it does not expire
        with contextlib.suppress(SquidstepError):
            result = call.decode(common)
            if isinstance(result, BeginResult) and result.decision == "execute":
                claims.append(result.step_run)
