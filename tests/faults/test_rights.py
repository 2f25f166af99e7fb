"""Users with too few rights: the server rejects the calls, nothing is written, and the store uses no other keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from support.backends import Backend, Bench, contents
from support.operations import CALLS, WORKFLOWS, perform, prepare
from support.records import begun

from squidstep_redis import Level, OutcomeUnknownError, RefusedError, ServerError, StepRunNotFoundError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.keys import member_prefix

from .kit import Stores

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")

OWN: Final = "own"
COMMANDS: Final = "+@read +@write +@scripting +@transaction -@dangerous +time"  # the rights that the errors advise
RIGHTS: Final = f"~{OWN}:{{* {COMMANDS}"
OPERATIONS: Final = [*CALLS, *WORKFLOWS]
# Each denies a whole group of commands, or the keys.
DENIALS: Final = ["-@write", "-@hash", "-@sortedset", "-@read", "-@scripting", "resetkeys", f"resetkeys ~{OWN}-2:{{*"]


@pytest.fixture(scope="module")
def server(binary: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=binary, port=0) as server:
        yield server


@pytest.fixture
def admin(server: EmbeddedServer) -> Iterator[Any]:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.acl_log_reset()
        yield client


def user(admin: Any, server: EmbeddedServer, rights: str) -> str:
    """Creates a user, in place of an earlier one, and returns its URL."""
    admin.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">secret", *rights.split())
    return f"redis://worker:secret@{server.host}:{server.port}/0"


@pytest.fixture
def bench(server: EmbeddedServer, stores: Stores) -> Iterator[Bench]:
    """Stores of a user with all rights."""
    made = Bench(Backend.of_url("valkey", server.url), stores.runner if stores.flavor == "asyncio" else None, OWN)
    yield made
    made.close()


def writes_nothing(operation: str) -> bool:
    """Whether an operation writes nothing: a read, or `resume_run` of a run that is not cancelled."""
    of_a_step = {"get_step_run", "attempts", "wait_for_step", "explain_step"}
    of_a_run = {"get_run", "scan_steps", "completed_steps", "completed_outputs", "step_statuses", "export_run"}
    of_a_run |= {"summarize_run", "resume_run", "explain_run"}
    across_runs = {"lapsed_claims", "live_claims", "failed_steps", "count_claims", "count_failed"}
    across_runs |= {"runs", "count_runs", "overview", "purge"}
    return operation in of_a_step | of_a_run | across_runs


def fail_and_complete(store: StepRunStore) -> None:
    """Fails a step once, then completes it."""
    store.fail_step(begun(store.begin_step("run", "pay", {}, lease=60)), {})
    store.complete_step(begun(store.begin_step("run", "pay", {}, lease=60)), {})


class TestMissingRights:
    @pytest.mark.parametrize("denial", DENIALS)
    def test_operations_without_rights_are_rejected_and_write_nothing(
        self, admin: Any, server: EmbeddedServer, stores: Stores, bench: Bench, denial: str
    ) -> None:
        claim = prepare(bench, bench.store())
        store = stores.from_url(user(admin, server, f"{RIGHTS} {denial}"), prefix=OWN)
        before = contents(admin, OWN)

        for operation in OPERATIONS:
            if operation == "batch":
                rejected = [result for result in perform(store, operation, claim) if isinstance(result, Exception)]
                assert len(rejected) >= 4  # at least its valid writes
                assert all(isinstance(error, ServerError | StepRunNotFoundError) for error in rejected)
            elif operation == "complete_steps":
                assert all(isinstance(result, ServerError) for result in perform(store, operation, claim))
            elif (denial == "-@write" and writes_nothing(operation)) or (
                denial == "-@hash" and operation in ("count_claims", "count_failed", "count_runs")
            ):
                perform(store, operation, claim)
            else:
                with pytest.raises(ServerError) as caught:
                    perform(store, operation, claim)
                # fork_run begins with a read, and says that it has written nothing.
                assert isinstance(caught.value, (RefusedError, OutcomeUnknownError)) or operation == "fork_run"
                assert not caught.value.transient, operation
                if isinstance(caught.value, RefusedError):
                    assert COMMANDS in str(caught.value)
            assert contents(admin, OWN) == before, operation

    @pytest.mark.parametrize("command", ["hset", "hdel", "zadd", "zrem"])
    def test_missing_command_is_found_by_doctor_and_reported_as_halfway(
        self, admin: Any, server: EmbeddedServer, stores: Stores, command: str
    ) -> None:
        """On Redis 6, a script cannot check its rights in advance. A single command is not denied by accident."""
        store = stores.from_url(user(admin, server, f"{RIGHTS} -{command}"), prefix=OWN)

        findings = {finding.check: finding.level for finding in store.doctor().findings}
        assert findings["self-test"] is Level.FAILURE
        with pytest.raises(OutcomeUnknownError, match="halfway"):
            fail_and_complete(store)


class TestPrefixes:
    @pytest.mark.parametrize("prefix", [f"{OWN}:tenant-b", f"{OWN}-2", f"{OWN}:"])
    def test_rights_for_a_prefix_open_no_longer_prefix(
        self, admin: Any, server: EmbeddedServer, stores: Stores, prefix: str
    ) -> None:
        url = user(admin, server, RIGHTS)
        stores.from_url(url, prefix=OWN).schedule_step("run", "pay", {})
        with pytest.raises(RefusedError):
            stores.from_url(url, prefix=prefix).schedule_step("run", "pay", {})

    def test_glob_characters_of_a_prefix_are_escaped_with_a_backslash(
        self, admin: Any, server: EmbeddedServer, stores: Stores
    ) -> None:
        url = user(admin, server, rf"~own\*\[a-z\]\?:{{* {COMMANDS}")
        stores.from_url(url, prefix="own*[a-z]?").schedule_step("run", "pay", {})
        with pytest.raises(RefusedError):
            stores.from_url(url, prefix="own1b2").schedule_step("run", "pay", {})


class TestReadsOnly:
    def test_member_that_cannot_be_dropped_hides_nothing(
        self, admin: Any, server: EmbeddedServer, stores: Stores, bench: Bench
    ) -> None:
        """A user without write rights can read a store, but cannot remove foreign members from its indexes."""
        prepare(bench, bench.store())
        for key, score in ((bench.keys("run")[2], 1), (bench.keys("run")[3], 9e12)):
            admin.zadd(key, {b"garbage": score})
        store = stores.from_url(user(admin, server, f"{RIGHTS} -@write"), prefix=OWN)
        before = contents(admin, OWN)

        assert [each.step for each in store.lapsed_claims(1)] == ["lapsed"]
        assert [each.step for each in store.live_claims(1)] == ["running"]
        assert [each.step for each in store.failed_steps(1)] == ["failed"]

        assert contents(admin, OWN) == before

    def test_stale_entry_that_cannot_be_dropped_hides_nothing(
        self, admin: Any, server: EmbeddedServer, stores: Stores, bench: Bench
    ) -> None:
        """Such as that of a run that has expired, for a user without write rights, or on a replica."""
        prepare(bench, bench.store())
        claims, failed = bench.keys("run")[2:]
        admin.zadd(claims, {member_prefix(b"run") + b"gone": 1, member_prefix(b"run") + b"running": 2})
        admin.zadd(failed, {member_prefix(b"run") + b"gone": 9e12})
        store = stores.from_url(user(admin, server, f"{RIGHTS} -@write"), prefix=OWN)
        before = contents(admin, OWN)

        assert [each.step for each in store.lapsed_claims()] == ["lapsed"]
        assert [each.step for each in store.failed_steps()] == ["failed"]
        assert [each.step for each in store.overview(1).failed_steps] == ["failed"]

        assert contents(admin, OWN) == before


class TestSufficientRights:
    def test_advised_rights_suffice_for_every_operation(
        self, admin: Any, server: EmbeddedServer, stores: Stores, bench: Bench
    ) -> None:
        """All keys have the store's prefix, because the server lets the user access no others."""
        store = stores.from_url(user(admin, server, RIGHTS), prefix=OWN, run_ttl=3600)
        for operation in OPERATIONS:
            perform(store, operation, prepare(bench, store, run_id=operation))
        denied = {entry["object"] for entry in admin.acl_log()}
        # redis-py sends its name, and listing runs asks whether the server is a cluster. Both tolerate a denial.
        assert denied <= {"client", "client|setinfo", "cluster", "cluster|slots"}  # Redis 6 names no subcommand
        assert all(key.startswith(f"{OWN}:".encode()) for key in admin.keys("*"))


class TestAnotherPrefix:
    def test_another_prefix_is_neither_read_nor_written(
        self, admin: Any, server: EmbeddedServer, stores: Stores, bench: Bench
    ) -> None:
        """Not even a prefix that starts with the same letters."""
        other = f"{OWN}-2"
        claim = prepare(bench, bench.store(prefix=other))
        store = stores.from_url(user(admin, server, RIGHTS), prefix=other)
        before = contents(admin, "*")
        for operation in OPERATIONS:
            if operation in ("batch", "complete_steps"):  # they return the error of each call
                assert all(isinstance(result, ServerError) for result in perform(store, operation, claim))
            else:
                with pytest.raises((RefusedError, OutcomeUnknownError)):
                    perform(store, operation, claim)
        assert contents(admin, "*") == before
