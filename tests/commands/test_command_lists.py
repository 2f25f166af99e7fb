"""What `runs`, `stuck`, `failed` and `stats` list: limits, pages, totals and filters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from support.commands import (
    ANSI,
    add_failed_step,
    empty_store,
    invoke,
    invoke_on_terminal,
    on_terminal,
    options_of,
    run,
)
from support.records import begun, in_batch
from support.servers import find_binary, wait_until

from squidstep_redis import StepRunStore
from squidstep_redis.cli import listing
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


def fail_many(store: StepRunStore, count: int) -> None:
    calls = store.calls
    claims = in_batch(store, [calls.begin_step(f"run-{number}", "pay", {}) for number in range(count)])
    in_batch(store, [calls.fail_step(claim.step_run, ValueError("no")) for claim in claims])


def lapse_many(store: StepRunStore, count: int) -> None:
    in_batch(store, [store.calls.begin_step(f"run-{number}", "pay", {}, lease=60) for number in range(count)])
    for number in range(count):
        step_run = store.get_step_run(f"run-{number}", "pay")
        assert step_run is not None
        store.expire_claim(step_run)


class TestLimits:
    @pytest.mark.parametrize(("command", "fill"), [("failed", fail_many), ("stuck", lapse_many)])
    def test_cut_list_says_how_to_continue(
        self, server: EmbeddedServer, store: StepRunStore, command: str, fill: Any
    ) -> None:
        fill(store, 105)
        options = options_of(server, store)

        first = run(command, *options)

        assert len(first.stdout.splitlines()) == 1 + 100
        following = re.search(rf"100 of about 105 {command} steps: use --cursor (\S+) for the next page", first.stderr)
        assert following is not None
        second = run(command, "--cursor", following[1], *options)
        assert (len(second.stdout.splitlines()), second.stderr) == (1 + 5, "")
        rows = first.stdout.splitlines()[1:] + second.stdout.splitlines()[1:]
        assert len({match[0] for row in rows if (match := re.search(r"run-\d+", row))}) == 105
        filtered = run(command, "--run-prefix", "run-", *options)
        assert f"100 {command} steps; there may be more: use --cursor" in filtered.stderr
        everything = run(command, "--limit", "2000", *options)
        assert (len(everything.stdout.splitlines()), everything.stderr) == (1 + 105, "")

    @pytest.mark.parametrize("options", [("--label", "tenant=acme"), ("--type", "Declined")])
    def test_cursor_of_a_filtered_list_continues_after_its_last_step(
        self, server: EmbeddedServer, store: StepRunStore, options: tuple[str, str]
    ) -> None:
        for number in range(14):
            is_wanted = number % 2 == 0
            labels = {"tenant": "acme" if is_wanted else "other"}
            claim = store.begin_step(f"run-{number:02}", "pay", {}, labels=labels).step_run
            store.fail_step(claim, {"type": "Declined" if is_wanted else "Late"})

        found, cursor = [], []
        while cursor is not None:
            ended = run("failed", *options, "--limit", "3", *cursor, *options_of(server, store))
            found.append(re.findall(r"run-\d+", ended.stdout))
            following = re.search(r"--cursor (\S+) for the next page", ended.stderr)
            cursor = None if following is None else ["--cursor", following[1]]

        wanted = [f"run-{number:02}" for number in range(12, -1, -2)]
        assert [run for page in found for run in page] == wanted
        assert [len(page) for page in found[:2]] == [3, 3]

    def test_groups_say_that_they_are_not_complete(self, server: EmbeddedServer, store: StepRunStore) -> None:
        fail_many(store, 12)
        ended = run("failed", "--by-type", "--limit", "5", *options_of(server, store))
        assert "5 of about 12 failed steps" in ended.stderr
        assert re.search(r"^ +5  ValueError", ended.stdout, re.MULTILINE)

    @pytest.mark.parametrize("limit", [1, 3])
    def test_runs_has_at_most_limit_rows(self, server: EmbeddedServer, store: StepRunStore, limit: int) -> None:
        for number in range(10):
            store.schedule_step(f"run-{number}", "pay", {})
        newest_first = [summary.run_id for summary in store.runs().runs]
        seen: list[str] = []
        more: list[str] = []
        while True:
            ended = run("runs", "--limit", limit, *more, *options_of(server, store))
            rows = [row.split()[0] for row in ended.stdout.splitlines()[1:]]
            assert len(rows) <= limit
            seen += rows
            cursor = re.search(r"--cursor (\S+) for the next page, or a larger --limit, or --all\n", ended.stderr)
            if cursor is None:
                break
            assert ended.stderr.startswith(f"{limit} of 10 runs: ")
            more = ["--cursor", cursor[1]]
        assert (seen, ended.stderr) == (newest_first, "")
        assert len(seen) == 10


class TestFilters:
    @pytest.fixture
    def options(self, server: EmbeddedServer, store: StepRunStore) -> list[str]:
        add_failed_step(store, "order-1", "pay")
        add_failed_step(store, "order-2", "mail")
        store.fail_step(begun(store.begin_step("crawl-1", "pay", {})), {"type": "Declined", "message": "no funds"})
        for name in ("order-3", "crawl-2"):
            store.expire_claim(begun(store.begin_step(name, "pay", {}, lease=60)))
        return options_of(server, store)

    @pytest.mark.parametrize(
        ("command", "found"),
        [
            ("failed", "crawl-1 order-2 order-1"),
            ("failed --step pay", "crawl-1 order-1"),
            ("failed --run-prefix order-", "order-2 order-1"),
            ("failed --type Declined", "crawl-1"),
            ("failed --type ValueError --step pay", "order-1"),
            ("failed --since 1h", "crawl-1 order-2 order-1"),
            ("failed --since 2999-01-01", ""),
            ("stuck", "order-3 crawl-2"),
            ("stuck --run-prefix crawl", "crawl-2"),
            ("stuck --step mail", ""),
            ("stuck --since 2999-01-01T00:00+02:00", ""),
        ],
    )
    def test_filters_select_steps(self, options: list[str], command: str, found: str) -> None:
        ended = invoke(*command.split(), "--json", *options)
        listed = [each["run_id"] for each in json.loads(ended.stdout)]
        assert sorted(listed) == sorted(found.split())  # they may have changed in the same millisecond
        assert ended.exit_code == (1 if found else 0)

    def test_labels_select_runs_and_their_steps(
        self, server: EmbeddedServer, store: StepRunStore, options: list[str]
    ) -> None:
        for name, tenant in (("acme-1", "acme"), ("acme-2", "acme"), ("globex-1", "globex")):
            store.fail_step(begun(store.begin_step(name, "pay", {}, labels={"tenant": tenant, "kind": "order"})), {})
        store.expire_claim(begun(store.begin_step("acme-3", "pay", {}, lease=60, labels={"tenant": "acme"})))

        def listed(command: str) -> set[str]:
            found = json.loads(invoke(*command.split(), "--json", *options).stdout)
            return {each["run_id"] for each in (found["runs"] if isinstance(found, dict) else found)}

        assert listed("runs --label tenant=acme") == {"acme-1", "acme-2", "acme-3"}
        assert listed("runs --label tenant=acme --label kind=order --status failed") == {"acme-1", "acme-2"}
        assert listed("failed --label tenant=acme") == {"acme-1", "acme-2"}
        assert listed("failed --label tenant=acme --label kind=none") == set()
        assert listed("stuck --label tenant=acme") == {"acme-3"}
        assert "2 of 3 runs" in run("runs", "--label", "kind=order", "--limit", "2", *options).stderr
        retried = run("retry", "--all", "--label", "tenant=globex", "--yes", *options)
        assert retried.stdout == "pending: pay of globex-1\n"
        assert run("retry", "acme-1", "--label", "tenant=globex", *options).returncode == 1
        assert run("retry", "acme-1", "--step", "pay", "--label", "tenant=acme", *options).stdout

    @pytest.mark.parametrize("width", [80, 140])
    def test_labels_are_shown_with_each_run(self, server: EmbeddedServer, store: StepRunStore, width: int) -> None:
        labels = {f"name-{n}": "v" * 30 for n in range(8)}
        store.schedule_step("run-with-a-rather-long-id", "pay", {}, labels=labels)
        store.schedule_step("other", "pay", {})
        options = options_of(server, store)
        for command in ("runs", "show run-with-a-rather-long-id", "explain run-with-a-rather-long-id"):
            shown = ANSI.sub("", on_terminal(width, *command.split(), *options))
            assert max(map(len, shown.splitlines())) <= width
            text = "".join(shown.split())
            assert all(name in text for name in labels)

    def test_since_and_until_select_runs_by_creation(self, options: list[str], store: StepRunStore) -> None:
        def listed(*times: str) -> list[str]:
            return [each["run_id"] for each in json.loads(run("runs", "--json", *times, *options).stdout)["runs"]]

        created = store.runs().runs[-1].created_at
        assert created is not None
        first, after = created.isoformat(), (created + timedelta(milliseconds=1)).isoformat()
        oldest = {each.run_id for each in store.runs().runs if each.created_at == created}
        assert len(listed("--since", "1h")) == len(listed("--since", first)) == 5
        assert set(listed("--until", after)) == set(listed("--since", first, "--until", after)) == oldest
        assert listed("--until", first) == listed("--until", "1h") == []
        assert listed("--since", (datetime.now(UTC) + timedelta(days=2)).isoformat()) == []

    @pytest.mark.parametrize("time", ["soon", "2026-13-01", "1y", "-1h", "", "999999999w"])
    @pytest.mark.parametrize("command", ["failed --since", "runs --since", "runs --until"])
    def test_invalid_time_is_rejected(self, server: EmbeddedServer, command: str, time: str) -> None:
        ended = run(*command.split(), time, "-u", server.url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert command.split()[1] in ended.stderr
        assert "Traceback" not in ended.stderr

    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            (["acme"], "'acme' is not NAME=VALUE, such as tenant=acme"),
            (["=acme"], "'=acme' is not NAME=VALUE, such as tenant=acme"),
            (["tenant="], "'tenant=' is not NAME=VALUE, such as tenant=acme"),
            ([""], "'' is not NAME=VALUE, such as tenant=acme"),
            (["my tenant=acme"], "a name must be 1 to 32 ASCII letters, digits,"),
            (["tenant=" + "x" * 65], "must be 1 to 64 bytes of UTF-8, not 65"),
            (["tenant=\x1b[31m"], "must not contain control characters"),
            (["tenant=a", "tenant=b"], "'tenant' is given twice; a run has one value of each label"),
            ([f"name-{number}=x" for number in range(9)], "must be at most 8, not 9"),
        ],
    )
    @pytest.mark.parametrize("columns", [80, 140])
    def test_malformed_label_is_rejected(
        self, server: EmbeddedServer, columns: int, given: list[str], problem: str
    ) -> None:
        words = [word for text in given for word in ("--label", text)]
        ended = invoke("runs", *words, "-u", server.url, COLUMNS=str(columns))
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert f"Invalid value for '--label': {problem}" in ended.stderr
        assert "\x1b" not in ended.stderr

    @pytest.mark.parametrize("command", ["failed", "stuck", "retry --all", "retry order-1"])
    def test_each_command_says_how_a_label_is_given(self, server: EmbeddedServer, command: str) -> None:
        ended = run(*command.split(), "--label", "acme", "-u", server.url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "'acme' is not NAME=VALUE, such as tenant=acme" in ended.stderr

    def test_value_of_a_label_may_have_an_equals_sign(self, store: StepRunStore, options: list[str]) -> None:
        store.schedule_step("query", "pay", {}, labels={"query": "a=b, c"})
        assert run("runs", "--label", "query=a=b, c", *options).stdout.splitlines()[1].startswith("query ")

    @pytest.mark.parametrize("cursor", ["nonsense", "1", "1:?", ""])
    @pytest.mark.parametrize("command", ["runs", "stuck", "failed"])
    def test_invalid_cursor_is_rejected(self, server: EmbeddedServer, command: str, cursor: str) -> None:
        ended = run(command, "--cursor", cursor, "-u", server.url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "cursor: must be the cursor of another page" in ended.stderr

    def test_status_selects_steps_of_a_run(self, server: EmbeddedServer, store: StepRunStore) -> None:
        add_failed_step(store, "run", "pay")
        store.schedule_step("run", "mail", {})
        lines = run("show", "run", "--status", "failed", *options_of(server, store)).stdout.splitlines()
        assert lines[0] == "run  1 failed, 1 pending"
        assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == ["pay"]

    @pytest.mark.parametrize("as_json", [[], ["--json"]])
    def test_step_of_another_status_is_not_shown(
        self, server: EmbeddedServer, store: StepRunStore, as_json: list[str]
    ) -> None:
        add_failed_step(store, "run", "pay")
        words = ("show", "run", "pay", *as_json, *options_of(server, store))
        ended = run(*words, "--status", "pending")
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == "squidstep: run 'run', step 'pay': the step is failed, not pending\n"
        assert run(*words, "--status", "failed").stdout == run(*words).stdout

    def test_stats_count_the_store(self, options: list[str]) -> None:
        counts = {"running": 0, "stuck": 2, "failed": 3}
        assert json.loads(run("stats", "--json", *options).stdout) == {**counts, "runs": {"total": 5}}
        assert re.search(r"^runs +5  in any state", run("stats", *options).stdout, re.MULTILINE)
        every = json.loads(run("stats", "--all", "--json", *options).stdout)
        assert every["runs"] == {"total": 5, "failed": 3, "unfinished": 2}
        assert every["steps"] == {"total": 5, "pending": 0, "running": 2, "completed": 0, "failed": 3}
        assert re.search(r"^runs +5  .*2 unfinished", run("stats", "--all", *options).stdout, re.MULTILINE)


class TestTableOfRuns:
    @pytest.fixture
    def options(self, server: EmbeddedServer, store: StepRunStore) -> list[str]:
        for number in range(30):
            store.schedule_step(f"import-{number:02}", "load", {}, labels={"tenant": "globex"} if number % 2 else None)
        store.schedule_step("plain", "pay", {})
        labels = {"tenant": "acme", "region": "north", "note": "x" * 64}
        store.schedule_step("order-of-a-customer-" + "7" * 200, "pay", {}, labels=labels)
        return options_of(server, store)

    @pytest.mark.parametrize("columns", [80, 140])
    def test_long_ids_and_labels_are_folded(self, options: list[str], columns: int) -> None:
        lines = ANSI.sub("", on_terminal(columns, "runs", *options)).splitlines()
        assert max(map(len, lines)) <= columns
        assert re.fullmatch(r"run +labels +steps +of which +created +changed *", lines[0])
        # Runs of the same millisecond are ordered by id, so the run with the long id is among the first two.
        text = "".join(line[: lines[0].index("steps")] for line in lines)
        assert re.search(r"acme", re.sub(r"\s", "", text))
        assert sum(bool(re.search(r"  1  1 pending +\S.* ago  .* ago$", line)) for line in lines) == 20

    @pytest.mark.parametrize("columns", [80, 140])
    def test_page_without_labels_has_no_column_for_them(self, options: list[str], columns: int) -> None:
        lines = ANSI.sub("", on_terminal(columns, "runs", "--run-prefix", "plain", *options)).splitlines()
        assert re.fullmatch(r"run +steps +of which +created +changed *", lines[0])
        assert len(lines) == 2

    @pytest.mark.parametrize("columns", [80, 140])
    @pytest.mark.parametrize(
        ("filters", "said"),
        [
            ("", "20 of 32 runs: "),
            ("--label tenant=globex --limit 5", "5 of 15 runs: "),
            ("--run-prefix import- --limit 29", "29 of 30 runs: "),
            ("--since 1h --limit 1", "1 of 32 runs: "),
            ("--status pending", "20 runs; there may be more: "),
            ("--status pending --limit 1", "1 run; there may be more: "),
            ("--limit 32", None),
            ("--status pending --limit 32", None),
            ("--all", None),
        ],
    )
    def test_cut_page_says_how_many_runs_there_are(
        self, options: list[str], columns: int, filters: str, said: str | None
    ) -> None:
        ended = invoke_on_terminal(columns, "runs", *filters.split(), *options)
        if said is None:
            assert ended.stderr == ""
        else:
            assert re.fullmatch(
                rf"{said}use --cursor \S+ for the next page, or a larger --limit, or --all\n", ended.stderr
            )

    def test_all_prints_its_headings_once(
        self, options: list[str], store: StepRunStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listing, "_MAX_PAGE", 10)
        lines = run("runs", "--run-prefix", "import-", "--all", *options).stdout.splitlines()
        assert [line for line in lines if line.startswith("run ")] == lines[:1]
        assert [line.split()[0] for line in lines[1:]] == [
            each.run_id for each in store.runs(run_id_prefix="import-").runs
        ]
        assert run("runs", "--all", "--status", "failed", *options).stderr == "no runs\n"

    def test_headings_are_repeated_when_columns_change(
        self, options: list[str], store: StepRunStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listing, "_MAX_PAGE", 1)
        lines = run("runs", "--all", *options).stdout.splitlines()
        has_labels = [bool(summary.labels) for summary in store.runs().runs]
        headings = [line for line in lines if line.startswith("run ")]
        assert len(headings) == 1 + sum(one != other for one, other in pairwise(has_labels))
        assert len(lines) - len(headings) == 32

    def test_expired_run_is_counted_until_it_is_listed(self, server: EmbeddedServer, store: StepRunStore) -> None:
        options = options_of(server, store)
        for name in ("a", "b", "gone"):
            store.schedule_step(name, "pay", {})
        store.client.pexpire(store.calls.keys.run("gone").keys.steps, 1)
        wait_until(lambda: not store.get_run("gone"))

        counted = [json.loads(run("stats", "--json", *options).stdout)["runs"]["total"]]
        rows = run("runs", *options).stdout.splitlines()[1:]
        counted.append(json.loads(run("stats", "--json", *options).stdout)["runs"]["total"])

        assert sorted(row.split()[0] for row in rows) == ["a", "b"]
        assert counted == [3, 2]


class TestLongTexts:
    @pytest.fixture
    def options(self, server: EmbeddedServer, store: StepRunStore) -> list[str]:
        message = "the bank said: " + "no " * 5_000
        store.fail_step(begun(store.begin_step("run", "pay", {})), {"type": "T" * 500, "message": message})
        return options_of(server, store)

    @pytest.mark.parametrize("columns", [80, 140])
    @pytest.mark.parametrize("command", ["failed", "failed --by-type", "show run", "show run pay", "explain run"])
    def test_long_errors_are_cut_to_a_few_lines(self, options: list[str], columns: int, command: str) -> None:
        lines = ANSI.sub("", on_terminal(columns, *command.split(), *options)).splitlines()
        assert len(lines) <= 26
        assert max(map(len, lines)) <= columns
        assert any("TTTT" in line for line in lines)

    @pytest.mark.parametrize("command", ["failed --full", "show run --full", "show run pay --full"])
    def test_full_shows_all_of_an_error(self, options: list[str], command: str) -> None:
        assert "no " * 4_998 in run(*command.split(), *options).stdout
