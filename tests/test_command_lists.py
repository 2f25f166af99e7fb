"""What `runs`, `stuck`, `failed` and `stats` list: limits, pages, totals and filters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.commands import ANSI, add_failed_step, empty_store, invoke, on_terminal, options_of, run
from support.records import begun, in_batch
from support.servers import find_binary

from squidstep_redis import StepRunStore
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
    def test_cut_list_says_so_and_how_to_go_on(
        self, server: EmbeddedServer, store: StepRunStore, command: str, fill: Any
    ) -> None:
        fill(store, 105)
        options = options_of(server, store)

        first, second = run(command, *options), run(command, "--after", "100", *options)

        assert len(first.stdout.splitlines()) == 1 + 100
        assert f"100 of about 105 {command} steps: use --after 100 for the next page" in first.stderr
        assert (len(second.stdout.splitlines()), second.stderr) == (1 + 5, "")
        rows = first.stdout.splitlines()[1:] + second.stdout.splitlines()[1:]
        assert len({match[0] for row in rows if (match := re.search(r"run-\d+", row))}) == 105
        filtered = run(command, "--run-prefix", "run-", *options)
        assert f"100 {command} steps; there may be more: use --after 100" in filtered.stderr
        everything = run(command, "--limit", "2000", *options)
        assert (len(everything.stdout.splitlines()), everything.stderr) == (1 + 105, "")

    def test_groups_say_that_they_are_not_complete(self, server: EmbeddedServer, store: StepRunStore) -> None:
        fail_many(store, 12)
        ended = run("failed", "--by-type", "--limit", "5", *options_of(server, store))
        assert "5 of about 12 failed steps" in ended.stderr
        assert re.search(r"^ +5  ValueError", ended.stdout, re.MULTILINE)

    @pytest.mark.parametrize("limit", [1, 3])
    def test_runs_has_at_most_limit_rows(self, server: EmbeddedServer, store: StepRunStore, limit: int) -> None:
        for number in range(10):
            store.schedule_step(f"run-{number}", "pay", {})
        seen: list[str] = []
        more: list[str] = []
        while True:
            ended = run("runs", "--limit", limit, *more, *options_of(server, store))
            rows = [row.split()[0] for row in ended.stdout.splitlines()[1:]]
            assert len(rows) <= limit
            seen += rows
            cursor = re.search(r"--cursor (\S+) for", ended.stderr)
            if cursor is None:
                break
            more = ["--cursor", cursor[1]]
        assert sorted(seen) == [f"run-{number}" for number in range(10)]


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

    @pytest.mark.parametrize("label", ["tenant", "=acme", "a b=acme", "tenant=", "tenant=a\x1bb"])
    def test_malformed_label_is_rejected(self, server: EmbeddedServer, label: str) -> None:
        ended = run("runs", "--label", label, "-u", server.url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "--label" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "\x1b" not in ended.stderr

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

    def test_since_and_until_select_runs_by_creation(self, options: list[str]) -> None:
        def listed(since: str) -> list[str]:
            return [
                each["run_id"] for each in json.loads(run("runs", "--json", "--since", since, *options).stdout)["runs"]
            ]

        assert len(listed("1h")) == 5
        assert listed((datetime.now(UTC) + timedelta(days=2)).isoformat()) == []
        assert json.loads(run("runs", "--json", "--until", "1h", *options).stdout)["runs"] == []

    @pytest.mark.parametrize("since", ["soon", "2026-13-01", "1y", "-1h", "", "999999999w"])
    def test_invalid_time_is_rejected(self, server: EmbeddedServer, since: str) -> None:
        ended = run("failed", "--since", since, "-u", server.url)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "--since" in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_status_selects_steps_of_a_run(self, server: EmbeddedServer, store: StepRunStore) -> None:
        add_failed_step(store, "run", "pay")
        store.schedule_step("run", "mail", {})
        lines = run("show", "run", "--status", "failed", *options_of(server, store)).stdout.splitlines()
        assert lines[0] == "run  1 failed, 1 pending"
        assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == ["pay"]

    def test_stats_count_the_store(self, options: list[str]) -> None:
        assert json.loads(run("stats", "--json", *options).stdout) == {"runs": 5, "running": 0, "stuck": 2, "failed": 3}
        every = json.loads(run("stats", "--all", "--json", *options).stdout)
        assert every["runs"] == {"total": 5, "failed": 3, "unfinished": 2}
        assert every["steps"] == {"total": 5, "pending": 0, "running": 2, "completed": 0, "failed": 3}
        assert re.search(r"^runs +5  .*2 unfinished", run("stats", "--all", *options).stdout, re.MULTILINE)


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
