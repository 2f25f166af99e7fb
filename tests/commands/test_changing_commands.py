"""The commands that repair, delete, export and import runs, called as a user calls them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import screenshots
from support.commands import (
    add_failed_step,
    empty_store,
    invoke,
    options_of,
    run,
)
from support.records import begun
from support.servers import find_binary

from squidstep_redis import RunExistsError, StepRun, StepRunStore, StepStatus
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.usefixtures("default_environment")


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server


@pytest.fixture
def store(server: EmbeddedServer) -> Iterator[StepRunStore]:
    """An empty store for tests that write."""
    with empty_store(server) as store:
        yield store


class TestChanges:
    def test_retry_makes_failed_steps_pending(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        for step in ("one", "two", "three"):
            add_failed_step(store, "run", step)

        assert run("retry", "run", "--step", "one", "--dry-run", *options).stdout == "would retry one of run\n"
        assert set(store.step_statuses("run").values()) == {StepStatus.FAILED}
        assert run("retry", "run", "--step", "one", *options).stdout == "pending: one of run\n"
        assert run("retry", "run", *options).stdout == "pending: two of run\npending: three of run\n"
        assert set(store.step_statuses("run").values()) == {StepStatus.PENDING}
        assert (store.attempts("run", "one")[-1].owner or "").startswith("retry by ")
        again = run("retry", "run", *options)
        assert (again.returncode, again.stderr) == (1, "squidstep: run 'run': nothing to retry\n")
        store.begin_step("run", "one", {}, lease=60)
        refused = run("retry", "run", "--step", "one", *options)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "step 'one'" in refused.stderr

    def test_release_makes_a_running_step_pending(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        store.begin_step("run", "pay", {}, owner="dead")

        assert (
            "would release pay of run from attempt 1 by dead, no lease"
            in run("release", "run", "pay", "--dry-run", *options).stdout
        )
        assert run("release", "run", "pay", *options).returncode == 1  # stdin is empty: no confirmation
        assert store.step_statuses("run") == {"pay": StepStatus.RUNNING}
        assert run("release", "run", "pay", "--yes", *options).stdout == "released pay of run\n"
        assert store.step_statuses("run") == {"pay": StepStatus.PENDING}
        assert "the step is pending, not running" in run("release", "run", "pay", "--yes", *options).stderr
        assert "no such step" in run("release", "run", "none", "--yes", *options).stderr

    def test_release_leaves_a_later_claim_alone(
        self, server: EmbeddedServer, store: StepRunStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dead = begun(store.begin_step("run", "pay", {}, owner="dead"))

        def confirm_after_a_takeover(*_: object, **__: object) -> bool:
            store.expire_claim(dead)
            store.begin_step("run", "pay", {}, owner="alive")
            return True

        monkeypatch.setattr("squidstep_redis.cli.changes.confirm", confirm_after_a_takeover)
        refused = run("release", "run", "pay", *options_of(server, store))
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "attempt 2 holds the claim. Nothing was written" in refused.stderr
        current = store.get_step_run("run", "pay")
        assert current is not None
        assert (current.status, current.owner) == (StepStatus.RUNNING, "alive")

    def test_cancel_and_resume_are_shown(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        store.schedule_step("run", "pay", {})

        assert run("cancel", "run", "--dry-run", *options).stdout == "would cancel run\n"
        assert store.begin_step("run", "ship", {}).decision == "execute"
        assert run("cancel", "run", "--reason", "wrong address", *options).stdout == "cancelled run\n"
        assert store.begin_step("run", "pay", {}).cancelled
        assert "cancelled: wrong address" in run("runs", *options).stdout
        assert "cancelled: wrong address" in run("show", "run", *options).stdout
        assert json.loads(run("runs", "--json", *options).stdout)["runs"][0]["cancel_reason"] == "wrong address"
        assert run("resume", "run", "--dry-run", *options).stdout == "would resume run\n"
        assert run("resume", "run", *options).stdout == "resumed run\n"
        assert "cancelled" not in run("runs", *options).stdout
        assert store.begin_step("run", "pay", {}).decision == "execute"
        for command in ("cancel", "resume"):
            assert run(command, "other", *options).returncode == 1
            assert "no such run" in run(command, "other", "--dry-run", *options).stderr

    def test_delete_asks_and_deletes_the_run(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        add_failed_step(store)

        assert run("delete", "run", "--dry-run", *options).stdout == "would delete run (1 failed)\n"
        refused = invoke("delete", "run", *options, input="n\n")
        assert refused.exit_code == 1
        assert "Delete run (1 failed)? [y/N]" in refused.output
        assert store.get_run("run")
        assert invoke("delete", "run", *options, input="y\n").output.endswith("deleted run\n")
        assert store.get_run("run") == []

    def test_delete_removes_a_corrupt_run(self, server: EmbeddedServer, store: StepRunStore) -> None:
        store.complete_step(store.begin_step("run", "pay", {}).step_run, {})
        store.client.delete(store.calls.keys.run("run").keys.done)
        options = options_of(server, store)
        assert "corrupt" in run("delete", "run", "--dry-run", *options).stdout
        assert "evicted" in run("runs", *options).stdout
        assert run("delete", "run", "--yes", *options).returncode == 0
        assert run("runs", *options).stdout == ""

    def test_purge_deletes_old_finished_runs(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        for name in ("a", "b", "c", "d"):
            add_failed_step(store, name)
        store.schedule_step("pending", "pay", {})

        assert run("purge", "--older-than", "1h", *options).stderr == "nothing to purge\n"
        planned = run("purge", "--older-than", "0.001", "--dry-run", *options).stdout
        assert re.fullmatch(r"would delete 4 runs: ., ., ., …\n", planned)
        planned_json = json.loads(run("purge", "--older-than", "0.001", "--dry-run", "--json", *options).stdout)
        assert {each["run_id"] for each in planned_json} == set("abcd")
        assert run("purge", "--older-than", "0.001", *options).returncode == 1  # stdin is empty: no confirmation
        assert len(store.runs().runs) == 5
        assert run("purge", "--older-than", "0.001", "--yes", *options).stdout == "deleted 4 runs\n"
        assert [each.run_id for each in store.runs().runs] == ["pending"]

    def test_purge_deletes_no_run_that_was_not_counted(
        self, server: EmbeddedServer, store: StepRunStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those that become old enough while it asks stay."""
        ages, purge = list[timedelta](), StepRunStore.purge

        def spy(self: StepRunStore, older_than: timedelta, **options: Any) -> Any:
            ages.append(older_than)
            return purge(self, older_than, **options)

        def confirm_after_a_while(*_: object, **__: object) -> bool:
            time.sleep(0.05)
            return True

        add_failed_step(store)
        monkeypatch.setattr(StepRunStore, "purge", spy)
        monkeypatch.setattr("squidstep_redis.cli.changes.confirm", confirm_after_a_while)
        assert run("purge", "--older-than", "0.001", *options_of(server, store)).returncode == 0
        assert ages[1] - ages[0] >= timedelta(seconds=0.05)

    @pytest.mark.parametrize("age", ["soon", "-1", "3y", "", "0", "999999999w"])
    def test_purge_rejects_an_invalid_age(self, server: EmbeddedServer, age: str) -> None:
        ended = run("purge", "--older-than", age, "--yes", "-u", server.url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "older" in ended.stderr
        assert "Traceback" not in ended.stderr


class TestTransfer:
    def test_imported_runs_equal_the_exported_ones(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        with empty_store(server) as source:
            screenshots.fill(source)
            expected = source.get_run("order-7301")
            lines = run("export", "order-7301", "crawl-2026-11", *options_of(server, source)).stdout
        assert len(lines.splitlines()) == 2

        assert (
            run("import", "--dry-run", *options, input=lines).stdout
            == "would import order-7301\nwould import crawl-2026-11\n"
        )
        assert store.runs().runs == []
        assert run("import", *options, input=lines).stdout == "imported order-7301\nimported crawl-2026-11\n"
        assert list(map(fields_of, store.get_run("order-7301"))) == list(map(fields_of, expected))
        again = run("import", *options, input=lines)
        assert (again.returncode, again.stdout) == (1, "")
        assert f"line 1: {RunExistsError('order-7301')}" in again.stderr
        for broken in ("{", "[]", '{"squidstep_run": 2}', lines.splitlines()[0][:-1] + ', "run_id": ""}'):
            ended = run("import", *options, input=f"{broken}\n")
            assert (ended.returncode, ended.stdout) == (1, "")
            assert ended.stderr.startswith("squidstep: line 1: ")
            assert "Traceback" not in ended.stderr

    def test_corrupt_or_missing_run_hides_no_other(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        with empty_store(server) as source:
            for name in ("one", "corrupt", "two"):
                add_failed_step(source, name)
            lines = run("export", "one", "none", "corrupt", "two", *options_of(server, source))
            assert (lines.returncode, lines.stderr) == (1, "squidstep: run 'none': there is no such run\n")
            assert len(lines.stdout.splitlines()) == 3
            client: Any = source.client
            client.set(source.calls.keys.run("corrupt").keys[1], "overwritten")
            exported = run("export", "one", "corrupt", "two", *options_of(server, source))
            assert (exported.returncode, len(exported.stdout.splitlines())) == (1, 2)
            assert "holds a value of another type" in exported.stderr

        client.set(store.calls.keys.run("corrupt").keys[0], "overwritten")
        for dry_run in (["--dry-run"], []):
            ended = run("import", *dry_run, *options, input=lines.stdout)
            assert (ended.returncode, len(ended.stdout.splitlines())) == (1, 2)
            assert ended.stderr.startswith("squidstep: line 2: ")


class TestDryRun:
    """A dry run refuses what the command would refuse."""

    @pytest.mark.parametrize("step", ["completed", "leased", "unleased"])
    def test_step_that_has_not_failed_is_refused(self, server: EmbeddedServer, store: StepRunStore, step: str) -> None:
        options = options_of(server, store)
        claim = begun(store.begin_step("run", step, {}, lease=60 if step == "leased" else None, owner="w"))
        if step == "completed":
            store.complete_step(claim, {})
        status = "completed" if step == "completed" else "running"
        for words in (("retry", "run", "--step", step), ("complete", "run", step, "--output", "{}")):
            for dry_run in (["--dry-run"], []):
                ended = invoke(*words, *dry_run, *options)  # nothing is asked
                assert (ended.exit_code, ended.stdout) == (1, "")
                assert f"run 'run', step '{step}': " in ended.stderr
                assert f"the step is {status}" in ended.stderr

    @pytest.mark.parametrize("step", ["pending", "lapsed"])
    def test_step_that_can_be_retried_is_planned(self, server: EmbeddedServer, store: StepRunStore, step: str) -> None:
        store.schedule_step("run", step, {})
        if step == "lapsed":
            store.expire_claim(begun(store.begin_step("run", step, {}, lease=60)))
        for dry_run, word in ((["--dry-run"], "would retry"), ([], "pending:")):
            ended = run("retry", "run", "--step", step, *dry_run, *options_of(server, store))
            assert (ended.returncode, ended.stdout) == (0, f"{word} {step} of run\n")

    def test_deleted_run_is_neither_imported_nor_forked(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        for name in ("run", "gone"):
            store.complete_step(begun(store.begin_step(name, "pay", {})), {})
        document = json.dumps(store.export_run("gone"))
        store.delete_run("gone")
        for dry_run in (["--dry-run"], []):
            for ended in (
                run("import", *dry_run, *options, input=document),
                run("fork", "run", "gone", *dry_run, *options),
            ):
                assert (ended.returncode, ended.stdout) == (1, "")
                assert "run 'gone': was deleted recently; nothing was written" in ended.stderr

    @pytest.mark.parametrize("command", ["cancel", "resume"])
    def test_corrupt_run_is_refused(self, server: EmbeddedServer, store: StepRunStore, command: str) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        client: Any = store.client
        client.delete(store.calls.keys.run("run").keys[1])
        for dry_run in (["--dry-run"], []):
            ended = run(command, "run", *dry_run, *options_of(server, store))
            assert (ended.returncode, ended.stdout) == (1, "")
            assert "does not match the other key of run 'run'" in ended.stderr

    @pytest.mark.parametrize("command", ["cancel", "resume"])
    def test_corrupt_step_does_not_keep_its_run(
        self, server: EmbeddedServer, store: StepRunStore, command: str
    ) -> None:
        add_failed_step(store)
        client: Any = store.client
        client.hset(store.calls.keys.run("run").keys[0], "spay", "overwritten")
        for dry_run in (["--dry-run"], []):
            assert run(command, "run", *dry_run, *options_of(server, store)).returncode == 0

    def test_run_in_two_lines_is_imported_once(self, server: EmbeddedServer, store: StepRunStore) -> None:
        with empty_store(server) as source:
            add_failed_step(source)
            line = run("export", "run", *options_of(server, source)).stdout
        for dry_run, word in ((["--dry-run"], "would import"), ([], "imported")):
            ended = run("import", *dry_run, *options_of(server, store), input=line * 2)
            assert (ended.returncode, ended.stdout) == (1, f"{word} run\n")
            assert "line 2: run 'run': already exists" in ended.stderr

    @pytest.mark.parametrize(
        ("words", "problem"),
        [
            (("cancel", "run", "--reason", "a\nb"), "reason: must not contain control characters"),
            (("delete", "run", "--tombstone", "nan"), "tombstone: must be seconds"),
        ],
    )
    def test_invalid_arguments_are_rejected(
        self, server: EmbeddedServer, store: StepRunStore, words: tuple[str, ...], problem: str
    ) -> None:
        add_failed_step(store)
        ended = run(*words, "--dry-run", *options_of(server, store))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert problem in ended.stderr

    def test_run_that_is_named_twice_is_deleted_once(self, server: EmbeddedServer, store: StepRunStore) -> None:
        add_failed_step(store)
        for dry_run, text in ((["--dry-run"], "would delete run (1 failed)\n"), (["--yes"], "deleted run\n")):
            assert run("delete", "run", "run", *dry_run, *options_of(server, store)).stdout == text


class TestFork:
    def test_fork_creates_a_run_with_the_completed_steps(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        for step in ("reserve", "charge \x1b[31m", "ship"):
            store.complete_step(begun(store.begin_step("run", step, {})), {"of": step})
        add_failed_step(store, "run")

        planned = run("fork", "run", "new", "--through", "charge \x1b[31m", "--dry-run", *options)
        assert planned.stdout == "would fork run to new: 2 completed steps, through charge \\x1b[31m\n"
        assert store.get_run("new") == []
        forked = run("fork", "run", "new", "--step", "ship", "--step", "reserve", "--json", *options)
        assert json.loads(forked.stdout) == {"run_id": "new", "steps": ["reserve", "ship"]}
        assert store.completed_outputs("new") == [{"of": "reserve"}, {"of": "ship"}]
        forked = run("fork", "run", "newer", "--step", "ship", *options)
        assert forked.stdout == "forked run to newer: 1 completed step, through ship\n"

    @pytest.mark.parametrize(
        ("words", "code", "problem"),
        [
            (("none", "new"), 1, "run 'none': there is no such run; nothing was written"),
            (("run", "existing"), 1, "run 'existing': already exists"),
            (("run", "new", "--step", "pay"), 1, "run 'run', step 'pay': fork_run was refused: the step is failed"),
            (("run", "new", "--through", "none"), 1, "run 'run', step 'none': there is no such step run"),
            (("run", "new", "--through", "a", "--step", "b"), 2, "through: must not be given together with steps"),
            (("run", "new", "--step", ""), 2, "steps[0]: must be 1 to 512 bytes"),
            (("run", "run"), 2, "new_run_id: must differ from the original run"),
            (("run",), 2, "NEW_RUN"),
        ],
    )
    def test_refused_fork_writes_nothing(
        self, server: EmbeddedServer, store: StepRunStore, words: tuple[str, ...], code: int, problem: str
    ) -> None:
        add_failed_step(store, "run")
        store.complete_step(begun(store.begin_step("run", "a", {})), {})
        store.schedule_step("existing", "a", {})

        ended = run("fork", *words, *options_of(server, store))

        assert (ended.returncode, ended.stdout) == (code, "")
        assert problem in ended.stderr
        assert "Traceback" not in ended.stderr
        assert store.get_run("new") == []


def fields_of(step_run: StepRun) -> list[Any]:
    names = (
        "step",
        "status",
        "attempt",
        "owner",
        "input",
        "output",
        "last_error",
        "created_at",
        "started_at",
        "position",
    )
    return [getattr(step_run, name) for name in (*names, "ended_at", "lease_ends_at")]
