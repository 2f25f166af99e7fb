"""The commands that repair many steps or runs at once, and `complete`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from support.commands import add_failed_step, empty_store, invoke, options_of, run
from support.records import begun, stored
from support.servers import find_binary

from squidstep_redis import StepRunStore, StepStatus
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


@pytest.fixture
def options(server: EmbeddedServer, store: StepRunStore) -> list[str]:
    return options_of(server, store)


class TestRetry:
    @pytest.fixture
    def failed(self, store: StepRunStore) -> None:
        for number in range(3):
            labels = {"tenant": "globex" if number else "acme", "number": str(number)}
            store.schedule_step(f"order-{number}", "pay", {}, labels=labels)
            add_failed_step(store, f"order-{number}", "pay")
            add_failed_step(store, f"order-{number}", "mail")
        store.fail_step(begun(store.begin_step("crawl", "pay", {})), {"type": "Declined", "message": "no"}, final=True)

    def test_all_retries_the_failed_steps_of_the_store(
        self, store: StepRunStore, options: list[str], failed: None
    ) -> None:
        planned = run("retry", "--all", "--dry-run", *options)
        assert len(planned.stdout.splitlines()) == store.count_failed() == 7
        assert run("retry", "--all", *options).returncode == 1  # stdin is empty: no confirmation
        asked = invoke("retry", "--all", *options, input="y\n")
        assert "Retry 7 failed steps of 4 runs?" in asked.output
        assert len(re.findall("^pending: ", asked.stdout, re.MULTILINE)) == 7
        assert store.failed_steps() == []
        nothing = run("retry", "--all", "--yes", *options)
        assert (nothing.returncode, nothing.stderr) == (1, "squidstep: nothing to retry\n")

    @pytest.mark.parametrize(
        ("filters", "retried"),
        [
            ("--all --step pay", {"order-0 pay", "order-1 pay", "order-2 pay", "crawl pay"}),
            ("--all --type Declined", {"crawl pay"}),
            ("--all --run-prefix order-1 --since 1h", {"order-1 pay", "order-1 mail"}),
            ("order-0 order-2 --step mail", {"order-0 mail", "order-2 mail"}),
            ("order-0 crawl --type ValueError", {"order-0 pay", "order-0 mail"}),
            ("order-0 --since 2999-01-01", set[str]()),
            ("--all --label tenant=globex --step mail", {"order-1 mail", "order-2 mail"}),
            ("--all --label tenant=globex --label number=2", {"order-2 pay", "order-2 mail"}),
            ("--all --label tenant=other", set[str]()),
            ("order-0 order-1 crawl --label tenant=acme", {"order-0 pay", "order-0 mail"}),
            ("order-0 order-1 --label tenant=globex --step pay", {"order-1 pay"}),
            ("order-0 --label tenant=globex", set[str]()),
        ],
    )
    def test_filters_select_the_steps_to_retry(
        self, store: StepRunStore, options: list[str], failed: None, filters: str, retried: set[str]
    ) -> None:
        planned = run("retry", *filters.split(), "--dry-run", *options)
        ended = run("retry", *filters.split(), "--yes", *options)
        for printed, word in ((planned, "would retry"), (ended, "pending:")):
            assert {
                re.sub(rf"{word} (\S+) of (\S+)", r"\2 \1", line) for line in printed.stdout.splitlines()
            } == retried
        assert ended.returncode == (0 if retried else 1)
        assert len(store.failed_steps()) == 7 - len(retried)

    def test_unknown_run_or_step_changes_nothing(self, store: StepRunStore, options: list[str], failed: None) -> None:
        for words in (("order-0", "pay"), ("order-0", "none"), ("order-0", "crawl", "--step", "mail")):
            ended = run("retry", *words, *options)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert "nothing was changed" in ended.stderr
        assert len(store.failed_steps()) == 7

    def test_changed_step_does_not_stop_the_others(self, store: StepRunStore, options: list[str]) -> None:
        add_failed_step(store, "a", "pay")
        begun(store.begin_step("b", "pay", {}, lease=60))

        ended = run("retry", "b", "a", "--step", "pay", *options)

        assert (ended.returncode, ended.stdout) == (0, "pending: pay of a\n")
        assert "run 'b', step 'pay': retry_step was refused" in ended.stderr

    @pytest.mark.parametrize("words", [[], ["run", "--all"]])
    def test_runs_and_all_exclude_each_other(self, server: EmbeddedServer, words: list[str]) -> None:
        ended = run("retry", *words, "-u", server.url)
        assert ended.returncode == 2
        assert "name one or more runs, or use --all" in ended.stderr


class TestDelete:
    def test_several_runs_are_deleted_after_one_question(self, store: StepRunStore, options: list[str]) -> None:
        for name in ("a", "b", "c"):
            add_failed_step(store, name)

        missing = run("delete", "a", "none", "--yes", *options)
        assert (missing.returncode, missing.stdout) == (1, "")
        assert "run 'none': no such run; nothing was deleted" in missing.stderr
        assert (
            run("delete", "a", "b", "--dry-run", *options).stdout == "would delete 2 runs: a (1 failed), b (1 failed)\n"
        )
        assert run("delete", "a", "b", "--yes", *options).stdout == "deleted a\ndeleted b\n"
        assert [summary.run_id for summary in store.runs().runs] == ["c"]

    @pytest.mark.parametrize("command", ["delete", "export"])
    def test_a_run_must_be_named(self, server: EmbeddedServer, command: str) -> None:
        ended = run(command, "-u", server.url)
        assert ended.returncode == 2
        assert "Missing argument 'RUN...'" in ended.stderr

    def test_purge_selects_by_status(self, store: StepRunStore, options: list[str]) -> None:
        add_failed_step(store, "failed")
        store.complete_step(begun(store.begin_step("completed", "pay", {})), {})

        def planned(status: str) -> str:
            return run("purge", "--older-than", "0.001", "--status", status, "--dry-run", *options).stdout

        assert planned("failed") == "would delete 1 run: failed\n"
        assert planned("completed") == "would delete 1 run: completed\n"
        assert run("purge", "--older-than", "0.001", "--status", "completed", "--yes", *options).returncode == 0
        assert [summary.run_id for summary in store.runs().runs] == ["failed"]


class TestComplete:
    @pytest.mark.parametrize("state", ["pending", "failed", "final", "delayed", "lapsed"])
    def test_step_done_by_hand_is_completed(self, store: StepRunStore, options: list[str], state: str) -> None:
        store.schedule_step("run", "pay", {"amount": 1})
        if state == "lapsed":
            store.expire_claim(begun(store.begin_step("run", "pay", {}, lease=60)))
        elif state != "pending":
            ending = {"final": {"final": True}, "delayed": {"retry_after": 600}}.get(state, {})
            store.fail_step(begun(store.begin_step("run", "pay", {})), ValueError("no"), **ending)

        planned = run("complete", "run", "pay", "--output", '{"receipt": 7}', "--dry-run", *options)
        assert planned.stdout.startswith("would complete pay of run, which is ")
        ended = run("complete", "run", "pay", "--output", '{"receipt": 7}', "--yes", *options)

        assert (ended.returncode, ended.stdout) == (0, "completed pay of run\n"), ended.stderr
        step_run = stored(store)
        assert (step_run.status, step_run.input, step_run.output) == ("completed", {"amount": 1}, {"receipt": 7})
        assert (step_run.owner or "").startswith("complete by ")

    def test_step_that_fails_before_the_confirmation_keeps_its_input(
        self, store: StepRunStore, options: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def confirm_after_a_failure(*_: object, **__: object) -> bool:
            store.fail_step(begun(store.begin_step("run", "pay", {})), ValueError("no"))
            return True

        store.schedule_step("run", "pay", {"amount": 1})
        monkeypatch.setattr("squidstep_redis.cli.changes.confirm", confirm_after_a_failure)
        assert run("complete", "run", "pay", "--output", "{}", *options).returncode == 0
        assert (stored(store).status, stored(store).input) == ("completed", {"amount": 1})

    def test_output_can_come_from_stdin(self, store: StepRunStore, options: list[str]) -> None:
        store.schedule_step("run", "pay", {})
        assert run("complete", "run", "pay", "--output", "-", "--yes", *options, input='{"a": [1]}').returncode == 0
        assert stored(store).output == {"a": [1]}

    def test_claimed_completed_and_cancelled_steps_are_refused(self, store: StepRunStore, options: list[str]) -> None:
        begun(store.begin_step("run", "live", {}, lease=60, owner="w1"))
        store.complete_step(begun(store.begin_step("run", "done", {})), {"mine": 1})
        store.schedule_step("stopped", "pay", {})
        add_failed_step(store, "stopped", "failed")
        store.cancel_run("stopped")

        for run_id, step, problem in (
            ("run", "live", "the step is running by w1, lease ends in "),
            ("run", "done", "the step is completed"),
            ("stopped", "pay", "the run is cancelled; resume it first"),
            ("stopped", "failed", "nothing was stored: the run is cancelled"),
            ("run", "none", "no such step: it has neither been scheduled nor begun"),
        ):
            ended = run("complete", run_id, step, "--output", "{}", "--yes", *options)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert problem in ended.stderr
        assert stored(store, "run", "done").output == {"mine": 1}
        assert stored(store, "stopped", "failed").status == StepStatus.FAILED

    @pytest.mark.parametrize(
        "output", ["{", "[]", "7", '{"a": 99999999999999999999}', '{"a": NaN}', '{"a": "\\ud800"}', "[" * 100_000, "-"]
    )
    def test_invalid_output_is_refused_and_changes_nothing(
        self, store: StepRunStore, options: list[str], output: str
    ) -> None:
        store.schedule_step("run", "pay", {})
        add_failed_step(store, "run", "failed")
        for step in ("pay", "failed"):
            ended = invoke("complete", "run", step, "--output", output, "--yes", *options, input=b"{\xff}")
            assert ended.exit_code == 2, ended.stderr
            assert "output" in ended.stderr
        assert store.step_statuses("run") == {"pay": StepStatus.PENDING, "failed": StepStatus.FAILED}
        assert len(store.attempts("run", "failed")) == 1


def test_json_of_explanations_has_actions_and_times(store: StepRunStore, options: list[str]) -> None:
    store.fail_step(begun(store.begin_step("run", "pay", {})), {}, retry_after=600)
    (step,) = json.loads(run("explain", "run", "--json", *options).stdout)["steps"]
    alone = json.loads(run("explain", "run", "pay", "--json", *options).stdout)
    assert step.keys() == alone.keys()
    assert (alone["reason"], alone["until"]) == ("delayed", step["until"])
    assert [action["operation"] for action in alone["actions"]] == [None, "retry_step"]
