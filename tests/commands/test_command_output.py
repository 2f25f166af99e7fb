"""What `show`, `timeline` and `explain` print, at 80 and at 140 columns and in a pipe."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.commands import ANSI, add_failed_step, empty_store, invoke, on_terminal, options_of, run, run_on_terminal
from support.demos import SQUIDSTEP
from support.records import begun
from support.servers import find_binary, wait_until

from squidstep_redis import Attempt, Outcome, StepRunStore
from squidstep_redis.cli.timeline_chart import render_timeline
from squidstep_redis.cli.timeline_files import as_svg
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.formatting import format_command
from squidstep_redis.timelines import Bar, Timeline

pytestmark = pytest.mark.usefixtures("default_environment")

WIDTHS = pytest.mark.parametrize("columns", [80, 140])
BEGAN = datetime(2026, 11, 27, 8, 20, tzinfo=UTC)


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


def shown(columns: int, *arguments: str) -> list[str]:
    """Returns the lines of a command on a terminal of this width, which none of them exceeds."""
    lines = ANSI.sub("", on_terminal(columns, *arguments)).splitlines()
    assert max(map(len, lines)) <= columns
    return lines


def attempt(outcome: Outcome, start: float, seconds: float | None, number: int = 1) -> Attempt:
    started = BEGAN + timedelta(seconds=start)
    ended = None if seconds is None else started + timedelta(seconds=seconds)
    return Attempt(number, "w", outcome, None, started, ended)


class TestShow:
    @WIDTHS
    def test_one_step_has_the_counts_of_its_run(self, store: StepRunStore, options: list[str], columns: int) -> None:
        add_failed_step(store, "run", "pay")
        store.schedule_steps("run", {"mail": {}, "ship": {}})
        assert shown(columns, "show", "run", "mail", *options)[0] == "run  1 failed, 2 pending"

    @WIDTHS
    def test_times_are_labelled_and_have_dates(self, store: StepRunStore, options: list[str], columns: int) -> None:
        begun(store.begin_step("run", "live", {}, lease=600))
        add_failed_step(store, "run", "pay")
        store.schedule_step("run", "mail", {})

        text = "\n".join(shown(columns, "show", "run", *options))

        date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.search(rf"pay +failed +took \d+ ms.*\n +when  began {date}, ended {date} UTC", text)
        assert re.search(rf"live +running +for .* lease ends in (10 min|9 min \d+ s)\n +when  began {date} UTC", text)
        assert re.search(rf"mail +pending\s*\n +when  scheduled {date} UTC", text)
        one = "\n".join(shown(columns, "show", "run", "pay", *options))
        assert re.search(rf"attempt 1  failed  began {date} UTC, took \d+ ms  w\n +ValueError: declined", one)
        assert one.count("ValueError: declined") == 1

    def test_full_does_not_cut_names(self, store: StepRunStore, options: list[str]) -> None:
        name, owner = "a-step-with-a-long-name-" * 5, "an-owner-with-a-long-name-" * 5
        begun(store.begin_step("run", name, {}, owner=owner))
        for arguments in (["show", "run"], ["show", "run", "--full"]):
            assert f"{name}  running" in run(*arguments, *options).stdout  # a pipe has no width
            assert owner in run(*arguments, *options).stdout
        assert f"{name}" in "".join(shown(80, "show", "run", "--full", *options))
        assert name not in "".join(shown(80, "show", "run", *options))

    @WIDTHS
    def test_long_names_leave_room_for_the_rest(self, store: StepRunStore, options: list[str], columns: int) -> None:
        begun(store.begin_step("run", "n" * 200, {}, owner="o" * 200))
        line = next(line for line in shown(columns, "show", "run", *options) if line.startswith("nnn"))
        assert "…  running" in line

    def test_payload_in_a_pipe_stays_on_one_line(self, store: StepRunStore, options: list[str]) -> None:
        store.schedule_step("run", "pay", {"text": "a b " * 20_000})
        assert "a b " * 19_999 in run("show", "run", "--full", *options).stdout

    def test_real_terminal_shows_the_same(self, store: StepRunStore, options: list[str]) -> None:
        add_failed_step(store, "run", "pay")
        assert run_on_terminal(80, "show", "run", *options) == on_terminal(80, "show", "run", *options)


class TestLabels:
    LABELS = {"tenant": "acme", "region": "north"}

    @WIDTHS
    @pytest.mark.parametrize("command", ["show run", "show run pay", "explain run"])
    def test_head_has_labels_and_creation(
        self, store: StepRunStore, options: list[str], columns: int, command: str
    ) -> None:
        store.schedule_step("run", "pay", {}, labels=self.LABELS)
        store.cancel_run("run", "wrong address")
        summary = store.summarize_run("run")
        assert summary is not None
        assert summary.created_at is not None

        lines = shown(columns, *command.split(), *options)

        created = f"created {summary.created_at:%Y-%m-%d %H:%M:%S} UTC"
        assert [line.strip() for line in lines[:3]] == [
            "run  1 pending",
            f"region=north tenant=acme  {created}",
            "cancelled: wrong address",
        ]

    @WIDTHS
    @pytest.mark.parametrize("command", ["show run", "explain run"])
    def test_head_of_a_run_without_labels_is_one_line(
        self, store: StepRunStore, options: list[str], columns: int, command: str
    ) -> None:
        store.schedule_step("run", "pay", {})
        lines = shown(columns, *command.split(), *options)
        assert lines[0] == "run  1 pending"
        assert not any("created" in line for line in lines)

    @WIDTHS
    @pytest.mark.parametrize("command", ["show run", "explain run", "runs"])
    def test_long_labels_are_folded_and_not_cut(
        self, store: StepRunStore, options: list[str], columns: int, command: str
    ) -> None:
        labels = {f"name-{number}": f"{number}" * 64 for number in range(8)}
        store.schedule_step("run", "pay", {}, labels=labels)
        text = re.sub(r"\s", "", "".join(shown(columns, *command.split(), *options)))
        assert [value for value in labels.values() if text.count(value[0]) < 64] == []

    def test_json_has_labels_and_creation(self, store: StepRunStore, options: list[str]) -> None:
        store.schedule_step("run", "pay", {}, labels=self.LABELS)
        (listed,) = json.loads(run("runs", "--json", *options).stdout)["runs"]
        explained = json.loads(run("explain", "run", "--json", *options).stdout)["run"]
        (summary,) = store.runs().runs
        assert summary.created_at is not None
        for each in (listed, explained):
            assert each["labels"] == self.LABELS
            assert datetime.fromisoformat(each["created_at"]) == summary.created_at


class TestTimeline:
    def test_lapsed_claim_ends_with_its_lease(self, store: StepRunStore, options: list[str]) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        dead = begun(store.begin_step("run", "ship", {}, lease=0.05))
        assert dead.lease_ends_at is not None
        end = dead.lease_ends_at
        wait_until(lambda: datetime.now(UTC) > end + timedelta(seconds=0.5))

        lines = run("timeline", "run", *options).stdout.splitlines()

        assert lines[-1].endswith("50 ms lease expired")
        took = re.search(r"took (\d+) ms$", lines[0])
        assert took is not None
        assert int(took[1]) < 500

    @WIDTHS
    def test_old_lapsed_claim_does_not_squash_the_others(self, columns: int) -> None:
        bars = [
            Bar("pay", attempt(Outcome.COMPLETED, 0, 10)),
            Bar("ship", attempt(Outcome.RUNNING, 10, None), BEGAN + timedelta(seconds=20)),
        ]
        lines = [line.plain for line in render_timeline(Timeline("run", bars, BEGAN + timedelta(days=3)), columns)]
        assert lines[2].count("█") > columns // 4
        assert lines[3].endswith("10 s lease expired")

    @WIDTHS
    @pytest.mark.parametrize("seconds", [0.001, 0.002, 0.05, 1, 7, 59, 61, 3_599, 7_300, 90_000, 10**7])
    def test_ticks_of_the_axis_differ(self, columns: int, seconds: float) -> None:
        timeline = Timeline("run", [Bar("pay", attempt(Outcome.COMPLETED, 0, seconds))])
        scale = [line.plain for line in render_timeline(timeline, columns)][1].split("  ")
        labels = [label.strip() for label in scale if label.strip()]
        assert len(labels) == len(set(labels)) >= 2
        drawn = re.findall(r'class="d m"[^>]*>([^<]+)<', as_svg(timeline))
        assert 2 <= len(drawn) == len(set(drawn)) <= 6

    def test_labels_of_an_image_end_before_the_bars(self) -> None:
        bars = [Bar("W" * 200, attempt(Outcome.COMPLETED, 0, 1)), Bar("<&>", attempt(Outcome.FAILED, 0, 1))]
        root = ET.fromstring(as_svg(Timeline("run", bars)))
        space = "{http://www.w3.org/2000/svg}"
        bars_begin = min(float(rect.get("x", "0")) for rect in root.iter(f"{space}rect") if rect.get("class") != "p")
        labels = root.findall(f"{space}svg")
        assert len(labels) == 2
        for label in labels:  # an inner image shows nothing outside of it
            assert float(label.get("x", "0")) + float(label.get("width", "0")) < bars_begin
        assert [title.text for label in labels for title in label.iter(f"{space}title")] == ["W" * 200]

    def test_files_draw_a_lapsed_claim_as_expired(
        self, store: StepRunStore, options: list[str], tmp_path: Path
    ) -> None:
        store.expire_claim(begun(store.begin_step("run", "pay", {}, lease=60)))
        file = tmp_path / "a.html"
        assert run("timeline", "run", "--html", str(file), *options).returncode == 0
        assert "lease expired" in file.read_text("utf-8")


class TestExplain:
    @WIDTHS
    def test_explanation_names_why_next_and_commands(
        self, store: StepRunStore, options: list[str], columns: int
    ) -> None:
        store.fail_step(begun(store.begin_step("order 1", "pay", {})), ValueError("no"), final=True)
        store.schedule_step("order 1", "ship", {})

        lines = shown(columns, "explain", "order 1", *options)

        assert lines[0] == "order 1  1 failed, 1 pending"
        assert lines[2] == "pay  failed permanently"
        assert [line.split()[0] for line in lines if re.match(r"  \w", line)] == ["why", "next", "you"] * 2
        assert "$ squidstep retry 'order 1' --step pay" in [line.strip() for line in lines]
        assert "$ squidstep complete 'order 1' pay --output '{\"key\": \"value\"}'" in [line.strip() for line in lines]

    def test_named_commands_exist_and_do_what_they_say(self, store: StepRunStore, options: list[str]) -> None:
        add_failed_step(store, "run", "pay")
        store.expire_claim(begun(store.begin_step("run", "ship", {}, lease=60)))
        store.cancel_run("run")
        store.schedule_step("other", "mail", {})
        commands = {
            line.strip()[len("$ squidstep ") :]
            for steps in (["run", "pay"], ["run", "ship"])
            for line in run("explain", *steps, *options).stdout.splitlines()
            if "$ squidstep" in line
        }
        assert commands == {"resume run"}
        assert run("resume", "run", *options).returncode == 0
        for step, command in (("pay", ["retry", "run", "--step", "pay"]), ("ship", ["release", "run", "ship"])):
            assert f"$ squidstep {' '.join(command)}\n" in run("explain", "run", step, *options).stdout
            assert run(*command, *(["--yes"] if command[0] == "release" else []), *options).returncode == 0
            assert "pending: waits for a delivery" in run("explain", "run", step, *options).stdout

    @pytest.mark.parametrize(
        "name", ["-7", "--help", "family-\U0001f468\u200d\U0001f469", "it's\n\\two lines", "$HOME"]
    )
    def test_named_commands_work_in_bash_for_odd_names(
        self, store: StepRunStore, server: EmbeddedServer, name: str
    ) -> None:
        environment = {**os.environ, "SQUIDSTEP_REDIS_URL": server.url, "SQUIDSTEP_PREFIX": store.calls.prefix}
        add_failed_step(store, name, name)
        output = run("explain", *options_of(server, store), "--", name).stdout
        (command,) = (line.strip() for line in output.splitlines() if "$ squidstep retry" in line)

        line = command.replace("$ squidstep", shlex.quote(SQUIDSTEP), 1)
        subprocess.run(["bash", "-c", line], env=environment, check=True, capture_output=True)

        assert store.step_statuses(name) == {name: "pending"}

    def test_names_with_nul_have_no_command(self, store: StepRunStore) -> None:
        """No program can be given such a name: bash would end it at the NUL, and name another run."""
        store.fail_step(begun(store.begin_step("run\0s", "pay", {})), ValueError("no"))
        explained = store.explain_step("run\0s", "pay")
        assert explained is not None
        assert explained.actions
        assert [format_command(explained, action) for action in explained.actions] == [None] * len(explained.actions)

    def test_missing_run_and_step_say_what_may_be_wrong(self, store: StepRunStore, options: list[str]) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        missing = run("explain", "none", *options)
        assert (missing.returncode, missing.stdout) == (1, "")
        assert "no such run. It was never begun, has expired, or was deleted" in missing.stderr
        assert "neither been scheduled nor begun" in run("explain", "run", "none", *options).stderr
        assert "Every step is completed" in run("explain", "run", *options).stdout

    def test_brackets_in_an_error_are_shown_as_they_are(self, store: StepRunStore, options: list[str]) -> None:
        text = "[red]no[/red] [/] [bold :warning: \\[x]"
        store.fail_step(begun(store.begin_step("[/run]", "[/pay]", {}, owner="[/w]")), {"type": "E", "message": text})
        for command in (
            ["explain", "[/run]"],
            ["show", "[/run]"],
            ["show", "[/run]", "[/pay]"],
            ["failed"],
            ["watch", "--once"],
        ):
            shown_in_pipe = run(*command, *options).stdout
            on_screen = " ".join(" ".join(shown(200, *command, *options)).split())
            for printed in (shown_in_pipe, on_screen):
                assert text in printed, command
                assert "[/pay]" in printed
                assert "[/w]" in printed or command == ["failed"]
        assert run("timeline", "[/run]", *options).stdout.count("[/pay]") == 1

    def test_limit_says_how_many_are_left_out(self, store: StepRunStore, options: list[str]) -> None:
        store.schedule_steps("run", {f"step-{number}": {} for number in range(25)})
        lines = invoke("explain", "run", *options).stdout.splitlines()
        assert lines[-1] == "5 further steps are not completed: use --limit, or name a STEP"
        assert sum("waits for a delivery" in line for line in lines) == 20


class TestNewcomer:
    """The output of `explain` for stuck runs says the cause and the remedy, to a reader without a guide."""

    def stick(self, store: StepRunStore) -> None:
        """Prepares seven runs, each stuck for a different reason."""
        begun(store.begin_step("a-live-worker", "pay", {}, lease=600, owner="host-1:70"))
        store.expire_claim(begun(store.begin_step("a-dead-worker", "pay", {}, lease=600, owner="host-2:71")))
        begun(store.begin_step("no-lease", "pay", {}, owner="host-3:72"))
        store.fail_step(begun(store.begin_step("backoff", "pay", {})), TimeoutError("no reply"), retry_after=600)
        store.fail_step(begun(store.begin_step("declined", "pay", {})), ValueError("no funds"), final=True)
        store.schedule_step("not-delivered", "pay", {})
        store.schedule_step("stopped", "pay", {})
        store.cancel_run("stopped", "wrong address")

    CAUSES_AND_REMEDIES = {
        "a-live-worker": (
            "Worker host-1:70 began attempt 1",
            "holds the step until its lease ends",
            "Wait for the worker",
        ),
        "a-dead-worker": ("Worker host-2:71", "has died, hangs, or cannot reach the server", "deliver it again"),
        "no-lease": ("It has no lease", "If it is dead, nothing happens", "$ squidstep release no-lease pay"),
        "backoff": ("TimeoutError: no reply", "cannot be claimed before", "(in 9 min", "squidstep retry backoff"),
        "declined": ("failed permanently", "ValueError: no funds", "$ squidstep retry declined --step pay"),
        "not-delivered": ("no worker has claimed it", "Until one arrives, nothing happens", "deliver it again"),
        "stopped": ("The run is cancelled, with the reason: wrong address", "$ squidstep resume stopped"),
    }

    @WIDTHS
    def test_text_says_the_cause_and_the_remedy(self, store: StepRunStore, options: list[str], columns: int) -> None:
        self.stick(store)
        for run_id, words in self.CAUSES_AND_REMEDIES.items():
            text = " ".join(" ".join(shown(columns, "explain", run_id, *options)).split())
            assert [word for word in words if word not in text] == [], text
