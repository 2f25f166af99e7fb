"""The commands that show runs, called as a user calls them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import screenshots
from support.commands import (
    ANSI,
    CLOSED_PORT,
    add_failed_step,
    empty_store,
    invoke,
    on_terminal,
    options_of,
    run,
    run_on_terminal,
)
from support.demos import SQUIDSTEP
from support.servers import EmbeddedCluster, find_binary

from squidstep_redis import StepRunStore, StepStatus
from squidstep_redis.cli.entry import build_group
from squidstep_redis.cli.timeline import read_timeline
from squidstep_redis.cli.timeline_chart import render_timeline
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.timelines import Timeline

pytestmark = pytest.mark.usefixtures("default_environment")

GROUP = build_group()
COMMANDS = GROUP.list_commands(click.Context(GROUP))

READING = [
    ["runs"],
    ["show", "order-7301"],
    ["show", "order-7301", "charge"],
    ["timeline", "order-7301"],
    ["stuck"],
    ["failed"],
    ["failed", "--by-type"],
    ["explain", "order-7301"],
    ["explain", "order-7301", "ship"],
    ["stats", "--all"],
]
EXIT_CODES = {"stuck": 1, "failed": 1}  # when something is found; 0 for the other commands
EVIL = "\x1b]0;gotcha\x07\x1b[2J\x9b\x85\u202e\u2066\u061c\n\r\0"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server


@pytest.fixture(scope="module")
def filled(server: EmbeddedServer) -> Iterator[StepRunStore]:
    with StepRunStore.from_url(server.url) as store:
        screenshots.fill(store)
        yield store


@pytest.fixture
def store(server: EmbeddedServer) -> Iterator[StepRunStore]:
    """An empty store for tests that write."""
    with empty_store(server) as store:
        yield store


class TestReading:
    @pytest.mark.parametrize("columns", [80, 140])
    @pytest.mark.parametrize("arguments", READING, ids=" ".join)
    def test_output_fits_the_terminal(
        self, server: EmbeddedServer, filled: StepRunStore, arguments: list[str], columns: int
    ) -> None:
        shown = on_terminal(columns, *arguments, "-u", server.url)
        assert "\x1b[3" in shown  # colors
        lines = ANSI.sub("", shown).splitlines()
        assert len(lines) > 3
        assert max(map(len, lines)) <= columns
        assert "\x07" not in shown

    @pytest.mark.parametrize("arguments", READING, ids=" ".join)
    def test_output_in_a_pipe_has_no_colors(
        self, server: EmbeddedServer, filled: StepRunStore, arguments: list[str]
    ) -> None:
        ended = run(*arguments, "-u", server.url)
        assert ended.returncode == EXIT_CODES.get(arguments[0], 0)
        assert ended.stderr == ("" if arguments != ["runs"] else ended.stderr)
        assert not re.search(r"\x1b| $", ended.stdout, re.MULTILINE)

    @pytest.mark.parametrize("arguments", READING, ids=" ".join)
    def test_json_output_parses(self, server: EmbeddedServer, filled: StepRunStore, arguments: list[str]) -> None:
        result = invoke(*arguments, "-u", server.url, "--json")
        assert result.exit_code == EXIT_CODES.get(arguments[0], 0)
        assert json.loads(result.stdout)

    def test_a_long_run_is_read_in_pages(self, server: EmbeddedServer, store: StepRunStore) -> None:
        names = [f"step-{number}" for number in range(2_000)]
        store.schedule_steps("run", {name: {} for name in names})
        client: Any = store.client
        client.config_resetstat()

        shown = json.loads(run("show", "run", "--json", *options_of(server, store)).stdout)

        assert [each["step"] for each in shown] == names
        stats = client.info("commandstats")
        assert stats["cmdstat_hscan"]["calls"] >= 2
        assert "cmdstat_hgetall" not in stats
        one = json.loads(run("show", "run", names[-1], "--json", *options_of(server, store)).stdout)
        assert (one["step"], one["attempts"]) == (names[-1], [])
        assert run("watch", "run", "--once", *options_of(server, store)).stdout.count(" pending ") == len(names)

    @pytest.mark.parametrize(
        "command",
        [*READING, ["watch", "x"], ["export", "x"], ["retry", "x"], ["explain", "x"], ["stats"]],
        ids=" ".join,
    )
    def test_an_unreachable_server_is_reported_after_one_attempt(
        self, command: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attempts: list[object] = []
        connect = redis.connection.AbstractConnection.connect

        def count(connection: redis.connection.AbstractConnection) -> None:
            attempts.append(connection)
            connect(connection)

        monkeypatch.setattr(redis.connection.AbstractConnection, "connect", count)
        ended = run(*command, "-u", CLOSED_PORT)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert re.fullmatch(r"squidstep: .*Connection refused.*\n", ended.stderr)
        assert len(attempts) == 1

    @pytest.mark.parametrize("host", ["a..b", "a" * 64])
    def test_an_invalid_host_name_is_reported(self, host: str) -> None:
        ended = run("runs", "-u", f"redis://{host}")
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("squidstep: The name of the server's host is not valid: ")
        assert "host is not valid" in run("doctor", "-u", f"redis://{host}").stdout

    @pytest.mark.parametrize("command", ["show", "timeline", "watch", "export", "retry", "delete"])
    def test_a_missing_run_is_reported_in_one_line(self, server: EmbeddedServer, command: str) -> None:
        ended = run(command, f"none{EVIL[:-1]}", "-u", server.url)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert re.fullmatch(r"squidstep: run 'none.*no.*\n", ended.stderr)
        assert "\x1b" not in ended.stderr

    def test_stored_control_characters_are_escaped(self, server: EmbeddedServer, store: StepRunStore) -> None:
        store.fail_step(store.begin_step(EVIL, EVIL, {"x": EVIL, EVIL: b""}, owner="w").step_run, {"type": EVIL})
        store.begin_step("stuck", EVIL, {}, lease=0.001)
        store.complete_step(store.begin_step("stuck", "done", {}).step_run, {EVIL: EVIL})
        commands = ("runs", "stuck", "failed", "failed --by-type", "show stuck", "watch --once", "watch stuck --once")
        for line in (*commands, "show stuck --json", "watch stuck --once --json", "export stuck", "timeline stuck"):
            result = invoke(*line.split(), *options_of(server, store))
            assert result.exit_code in (0, 1)
            assert "gotcha" in result.stdout
            assert result.stdout.replace("\n", "").isprintable(), line
        for name in ("svg", "html"):
            result = invoke("timeline", "stuck", f"--{name}", os.devnull, *options_of(server, store))
            assert result.exit_code == 0

    def test_an_empty_store_prints_nothing(self, server: EmbeddedServer, store: StepRunStore) -> None:
        for command in ("runs", "stuck", "failed"):
            ended = run(command, *options_of(server, store))
            assert (ended.returncode, ended.stdout) == (0, "")
            assert json.loads(invoke(command, "--json", *options_of(server, store)).stdout) in (
                [],
                {"runs": [], "cursor": None},
            )


class TestRuns:
    def test_pages_and_filters_find_the_right_runs(self, server: EmbeddedServer, store: StepRunStore) -> None:
        for number in range(60):
            store.schedule_step(f"run-{number:02}", "step", {})
        add_failed_step(store, "other")

        def listed(*arguments: str) -> dict[str, Any]:
            return json.loads(invoke("runs", "--json", *arguments, *options_of(server, store)).stdout)

        seen: list[str] = []
        page = listed("--limit", "10")
        while True:
            assert len(page["runs"]) == min(10, 61 - len(seen))
            seen += [each["run_id"] for each in page["runs"]]
            if page["cursor"] is None:
                break
            page = listed("--limit", "10", "--cursor", page["cursor"])
        assert sorted(seen) == ["other", *(f"run-{number:02}" for number in range(60))]
        assert [each["run_id"] for each in listed("--all")["runs"]] == seen
        created = [each["created_at"] for each in listed("--all")["runs"]]
        assert created == sorted(created, reverse=True)
        assert [each["run_id"] for each in listed("--status", "failed", "--all")["runs"]] == ["other"]
        assert len(listed("--run-prefix", "run-1", "--all")["runs"]) == 10
        assert "5 of 61 runs: use --cursor" in run("runs", "--limit", "5", *options_of(server, store)).stderr

    def test_a_cluster_lists_the_runs_of_all_nodes(self) -> None:
        with EmbeddedCluster() as cluster:
            store = StepRunStore.from_url(cluster.url)
            store.close()
            names = [f"run-{number}" for number in range(50)]
            lines = "".join(json.dumps(exported_run(name)) + "\n" for name in names)
            imported = run("import", "-u", cluster.url, input=lines)
            assert len(imported.stdout.splitlines()) == 50
            listed = json.loads(run("runs", "--all", "--json", "-u", cluster.nodes[1].url).stdout)
        assert sorted(each["run_id"] for each in listed["runs"]) == sorted(names)


def exported_run(run_id: str) -> dict[str, Any]:
    step = {"step": "a", "position": 1, "state": "pending", "created_at": "2026-01-01T00:00:00.000+00:00", "input": {}}
    step |= {"attempt": 0, "attempts_released": 0, "token": "", "scheduled_by": "", "history": []}
    return {"squidstep_run": 1, "run_id": run_id, "ttl": None, "steps_created": 1, "completed": [], "steps": [step]}


class TestShow:
    def test_full_prints_long_payloads_uncut(self, server: EmbeddedServer, store: StepRunStore) -> None:
        store.schedule_step("run", "step", {"text": "x" * 2_000})
        add_failed_step(store)
        brief, full = (invoke("show", "run", *more, *options_of(server, store)).stdout for more in ([], ["--full"]))
        assert "use --full to see all" in brief
        assert "x" * 2_000 in full
        assert "Traceback" not in brief
        assert "ValueError: declined" in brief

    def test_payloads_of_another_codec_are_reported(self, server: EmbeddedServer, store: StepRunStore) -> None:
        class Reversed:
            def encode(self, payload: dict[str, Any]) -> bytes:
                return json.dumps(payload).encode()[::-1]

            def decode(self, data: bytes) -> dict[str, Any]:
                return json.loads(data[::-1])

        other = StepRunStore(store.client, prefix=store.calls.prefix, codec=Reversed())
        add_failed_step(other)
        for arguments in (["show", "run"], ["failed"], ["failed", "--by-type"], ["show", "run", "--json"]):
            assert "decode" in invoke(*arguments, *options_of(server, store)).stdout

    def test_progress_of_an_unfinished_step_is_shown(self, server: EmbeddedServer, store: StepRunStore) -> None:
        claim = store.begin_step("run", "crawl", {}).step_run
        store.checkpoint_step(claim, {"page": 7, "text": EVIL})

        lines = invoke("show", "run", *options_of(server, store)).stdout.splitlines()
        shown = json.loads(invoke("show", "run", "crawl", "--json", *options_of(server, store)).stdout)

        assert any(line.strip().startswith('prog  {"page": 7') for line in lines)
        assert all(line.isprintable() for line in lines)
        assert shown["progress"] == {"page": 7, "text": EVIL}

    def test_json_of_a_step_shows_facts_about_its_run(self, server: EmbeddedServer, store: StepRunStore) -> None:
        labels = {"tenant": "acme", "order": "7"}
        store.schedule_step("run", "pay", {}, labels=labels)
        for reason in (None, "wrong address"):
            if reason is not None:
                store.cancel_run("run", reason)
            (of_run,) = json.loads(invoke("show", "run", "--json", *options_of(server, store)).stdout)
            of_step = json.loads(invoke("show", "run", "pay", "--json", *options_of(server, store)).stdout)
            for shown in (of_run, of_step):
                assert (shown["labels"], shown["cancel_reason"]) == (labels, reason)

    def test_each_attempt_shows_its_error(self, server: EmbeddedServer, store: StepRunStore) -> None:
        for problem in ("first", "second"):
            store.fail_step(store.begin_step("run", "pay", {}).step_run, ValueError(problem + EVIL))
        store.begin_step("run", "pay", {})
        arguments = ["show", "run", "pay", *options_of(server, store)]
        attempts: list[dict[str, Any]] = json.loads(invoke(*arguments, "--json").stdout)["attempts"]
        assert [each["error"] and each["error"]["message"] for each in attempts] == [
            "first" + EVIL,
            "second" + EVIL,
            None,
        ]
        lines = invoke(*arguments).stdout.splitlines()
        for number, problem in ((1, "first"), (2, "second")):
            place = next(place for place, line in enumerate(lines) if f" attempt {number}  " in line)
            assert f"ValueError: {problem}" in lines[place + 1]
        assert all(line.isprintable() for line in lines)


class TestFailures:
    def test_show_says_whether_a_failed_step_can_be_claimed(self, server: EmbeddedServer, store: StepRunStore) -> None:
        for step, options in {"at-once": {}, "final": {"final": True}, "later": {"retry_after": 3_600}}.items():
            store.fail_step(store.begin_step("run", step, {}).step_run, {"type": "E", "message": "e"}, **options)

        lines = invoke("show", "run", *options_of(server, store)).stdout.splitlines()
        shown = json.loads(invoke("show", "run", "--json", *options_of(server, store)).stdout)

        last_words = {line.split()[0]: line.split("  ")[-1].strip() for line in lines if " failed " in line[:30]}
        assert last_words["final"] == "failed permanently"
        assert re.fullmatch(r"can be retried in (59 min( \d+ s)?|1 h)", last_words["later"])
        assert "retry" not in last_words["at-once"]
        each = {step["step"]: (step["final"], step["retry_at"] is not None) for step in shown}
        assert each == {"at-once": (False, False), "final": (True, False), "later": (False, True)}


class TestTimeline:
    def test_files_load_nothing_from_elsewhere(
        self, server: EmbeddedServer, filled: StepRunStore, tmp_path: Path
    ) -> None:
        svg, html = tmp_path / "a.svg", tmp_path / "a.html"
        result = invoke("timeline", "order-7301", "--svg", str(svg), "--html", str(html), "-u", server.url)
        assert (result.exit_code, result.stdout) == (0, f"{svg}\n{html}\n")
        root = ET.fromstring(svg.read_text("utf-8"))
        space = "{http://www.w3.org/2000/svg}"
        bars = [rect for rect in root.iter(f"{space}rect") if rect.get("class") != "p"]
        assert len(bars) == 8
        for file in (svg, html):
            rest = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|src=|@import|url\(|<script", rest)
            assert "lease expired" in rest

    def test_bars_start_where_their_attempts_started(self, filled: StepRunStore) -> None:
        timeline = read_timeline(filled, "order-7301")
        assert timeline is not None
        now = max(bar.attempt.started_at for bar in timeline.bars if bar.attempt) + timedelta(seconds=0.2)
        lines = [line.plain for line in render_timeline(Timeline(timeline.run, timeline.bars, now), 100)]
        begins = {line.split("  ")[0]: re.split("[█▒░▓┄]", line) for line in lines[2:]}
        starts = [len(begins[name][0]) for name in ("reserve", "charge", "pack", "ship")]
        assert starts == sorted(set(starts))
        assert len(begins["notify"]) == 1
        assert len(lines) == 11

    def test_an_unwritable_file_is_reported(self, server: EmbeddedServer, filled: StepRunStore) -> None:
        ended = run("timeline", "order-7301", "--svg", "/none/x.svg", "-u", server.url)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == "squidstep: /none/x.svg: No such file or directory\n"


class TestWatch:
    @pytest.mark.parametrize(("fails", "code"), [(False, 0), (True, 1)])
    def test_in_a_pipe_each_change_is_one_line(
        self, server: EmbeddedServer, store: StepRunStore, fails: bool, code: int
    ) -> None:
        claim = store.begin_step("run", "pay", {}, owner="w").step_run
        command = [SQUIDSTEP, "watch", "run", "--interval", "0.05", *options_of(server, store)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            assert re.match(
                r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  pay  running  attempt 1  w\n", watching.stdout.readline()
            )
            _ = store.fail_step(claim, ValueError("no")) if fails else store.complete_step(claim, {})
            last = watching.stdout.read()
        assert watching.returncode == code
        assert re.match(r".*  pay  (failed  attempt 1  w  ValueError: no|completed  attempt 1  w)\n$", last)

    @pytest.mark.parametrize("columns", [80, 140])
    def test_a_long_run_fits_the_screen(self, server: EmbeddedServer, store: StepRunStore, columns: int) -> None:
        screenshots.crawl(store, "crawl")
        for step_run in store.get_run("crawl"):
            if step_run.status is StepStatus.RUNNING:
                store.complete_step(step_run.id, {})
        store.delete_pending_steps("crawl", [each.step for each in store.get_run("crawl")])
        shown = ANSI.sub("", on_terminal(columns, "watch", "crawl", *options_of(server, store), LINES="24"))
        lines = shown.splitlines()
        assert max(map(len, lines)) <= columns
        lines = lines[
            max(place for place, line in enumerate(lines) if line.startswith("crawl  ")) :
        ]  # the last drawing
        assert len(lines) <= 24
        assert "4 failed, 150 completed" in lines[0]
        assert sum("404 Not Found" in line for line in lines) == 4

    def test_the_store_view_lists_running_stuck_and_failed_steps(
        self, server: EmbeddedServer, filled: StepRunStore
    ) -> None:
        shown = run("watch", "--once", "-u", server.url).stdout
        for part in ("running", "stuck", "failed", "order-7301", "stuck-0", "Declined"):
            assert part in shown

    @pytest.mark.parametrize("columns", [80, 140])
    def test_the_store_view_says_that_it_is_cut(
        self, server: EmbeddedServer, store: StepRunStore, columns: int
    ) -> None:
        for number in range(6):
            add_failed_step(store, f"run-{number}")
            store.begin_step("run", f"step-{number}", {}, lease=60)
        shown = ANSI.sub("", on_terminal(columns, "watch", "--once", *options_of(server, store), LINES="20"))
        lines = shown.splitlines()
        assert "running: 4 of about 6" in lines
        assert "failed: 4 of about 6" in lines
        assert "stuck: none" in lines
        assert max(map(len, lines)) <= columns

    def test_in_a_pipe_the_store_is_printed_repeatedly(self, server: EmbeddedServer, store: StepRunStore) -> None:
        store.fail_step(store.begin_step("run", "pay", {}).step_run, ValueError("x" * 200))
        command = [SQUIDSTEP, "watch", "--interval", "0.05", *options_of(server, store)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            assert watching.stderr is not None
            lines = [watching.stdout.readline() for _ in range(8)]
            watching.send_signal(signal.SIGINT)
            assert "Traceback" not in watching.stderr.read()
        assert sum("x" * 200 in line for line in lines) == 2
        assert watching.returncode == 128 + signal.SIGINT

    @pytest.mark.parametrize("arguments", [[], ["run"]])
    def test_once_exits_while_steps_are_running(
        self, server: EmbeddedServer, store: StepRunStore, arguments: list[str]
    ) -> None:
        store.begin_step("run", "pay", {}, lease=60)  # watching without --once would go on
        command = ["watch", *arguments, "--once", *options_of(server, store)]
        ended = run(*command)
        assert (ended.returncode, "pay" in ended.stdout) == (0, True)
        assert "pay" in run_on_terminal(80, *command)

    @pytest.mark.parametrize("interval", ["nan", "0", "inf", "-1", "x"])
    def test_invalid_interval_is_rejected(self, server: EmbeddedServer, interval: str) -> None:
        ended = invoke("watch", "--once", "--interval", interval, "-u", server.url)
        assert (ended.exit_code, "Invalid value for '--interval'" in ended.stderr) == (2, True)

    @pytest.mark.parametrize("watched", ["run", "the store"])
    def test_with_json_each_line_is_an_object(self, server: EmbeddedServer, store: StepRunStore, watched: str) -> None:
        claim = store.begin_step("run", "pay", {"amount": 1}, lease=60, owner="w").step_run
        arguments = ["run"] if watched == "run" else []
        command = [SQUIDSTEP, "watch", *arguments, "--json", "--interval", "0.05", *options_of(server, store)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            first = json.loads(watching.stdout.readline())
            store.fail_step(claim, ValueError("no"))
            last = json.loads(next(line for line in watching.stdout if "ValueError" in line))
            watching.terminate()
        if watched == "the store":
            assert (first["stuck"], first["failed"], last["at_work"], last["stuck"]) == ([], [], [], [])
            (first,), (last,) = first["at_work"], last["failed"]
        assert (first["step"], first["status"], first["owner"]) == ("pay", "running", "w")
        assert not {"input", "output", "progress"} & {*first, *last}
        assert (last["status"], last["last_error"]["message"]) == ("failed", "no")


class TestHelp:
    @pytest.mark.parametrize("command", [name for name in COMMANDS if not name.startswith("demo")])
    def test_every_command_has_an_example(self, command: str) -> None:
        shown = invoke(command, "--help").stdout
        assert f"Example: squidstep {command}" in shown or f"| squidstep {command}" in shown
        assert ("--url" in shown) is (command != "dashboard")  # which connects to no server


def test_the_guide_pictures_are_small_and_self_contained() -> None:
    """Run tests/screenshots.py, and look at the pictures, when the commands' output changes."""
    for name in ("show", "timeline", "watch"):
        svg = (screenshots.IMAGES / f"{name}.svg").read_text("utf-8")
        assert ET.fromstring(svg) is not None
        assert len(svg) < 20_000
        assert not re.search(r"https?:", svg.replace("http://www.w3.org/2000/svg", ""))
        assert f"squidstep&#160;{name}" in svg


def test_pictures_can_be_generated(server: EmbeddedServer, store: StepRunStore) -> None:
    pictures = screenshots.screenshots(store)
    assert pictures.keys() == {"show", "timeline", "watch"}
    assert all(len(svg) > 5_000 and "@font-face" not in svg for svg in pictures.values())
