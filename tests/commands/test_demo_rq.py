"""`squidstep demo rq`: the command on real RQ workers, its check, and that it leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rq.job import JobStatus
from support import commands
from support.demos import (
    TIMEOUT,
    assert_leaves_nothing,
    create_tree,
    demo_context,
    processes_using,
    read_until,
    start,
    temporary_directory,
)

from squidstep_redis.demo.check import find_problems
from squidstep_redis.demo.rq import RqScenario
from squidstep_redis.demo.worker import Event

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
    # Python 3.12 and later: in a test's process, unlike in the command's, there are other threads.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return create_tree(tmp_path)


def test_jobs_finish_despite_killed_workers_and_work_horses(tree: Path) -> None:
    with temporary_directory() as temporary:
        with start("demo", "rq", tree, "--json", temporary=temporary) as process:
            shown, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, said
        assert processes_using(temporary) == set()
        assert list(temporary.iterdir()) == []
    result = json.loads(shown)
    assert (result["ok"], result["problems"]) == (True, [])
    assert (result["files"], result["steps"], result["completed"]) == (4, 12, 12)
    assert (result["started"], result["finished"]) == (14, 12)
    assert (result["takeovers"], result["duplicates"]) == (2, 1)
    assert result["workers_replaced"] >= 2
    assert result["busy"] >= 1
    assert result["delivered"] >= 4 + 1 + 3
    assert {
        killed: [attempt.split(",")[0] for attempt in attempts] for killed, attempts in result["killed"].items()
    } == {
        "work-horse inside compress of b/one.py": ["lease_expired", "completed"],
        "worker without work-horse inside count of b/two.txt": ["completed"],
        "worker and work-horse inside digest of c/empty.py": ["lease_expired", "completed"],
    }
    assert "count of b/two.txt was redelivered" in said
    assert "whose worker is dead, completed count of b/two.txt" in said


def test_wrong_output_fails_the_command(tree: Path) -> None:
    with temporary_directory() as temporary, start("demo", "rq", tree, temporary=temporary) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("4 files, 12 steps, 2 workers of RQ ")
        read_until(process, "was killed inside count of b/two.txt; its work-horse")
        (tree / "b/two.txt").write_text("other words\n")  # its digest is stored
        shown = process.stdout.read()
    assert process.returncode == 1
    assert "FAILED" in shown
    assert "b/two.txt: the store has" in shown
    assert "b/two.txt: its job is finished with {'sha256'" in shown


def test_check_finds_lost_jobs_and_missing_deliveries(tree: Path) -> None:
    with demo_context(tree) as context:
        scenario = RqScenario(context)
        scenario.run()
        assert find_problems(scenario) == []

        scenario.counts["takeovers"] += 1
        assert find_problems(scenario) == ["there were 3 takeovers instead of 2"]
        scenario.counts["takeovers"] -= 1
        delivered, scenario.counts["delivered"] = scenario.counts["delivered"], 6
        assert find_problems(scenario) == ["5 jobs were enqueued, 3 were killed, but only 6 were delivered"]
        scenario.counts["delivered"] = delivered

        job: Any = scenario.queue.fetch_job(scenario.jobs["a.py"])
        job.set_status(JobStatus.FAILED)
        (problem,) = find_problems(scenario)
        assert problem.startswith("a.py: its job is failed with ")
        job.delete()
        assert find_problems(scenario) == ["a.py: its job does not exist"]

        context.store.delete_run("b/two.txt")
        assert "count of b/two.txt: after a worker without work-horse was killed, its attempts are []" in find_problems(
            scenario
        )


def test_an_event_is_sent_in_one_write() -> None:
    event = Event("completed", 2**31, 2**31, 2**31, "compress", 2**31, 1.5)
    header = 8  # bytes, of multiprocessing
    assert len(pickle.dumps(event)) + header < 512  # the smallest PIPE_BUF that POSIX allows


@pytest.mark.parametrize(
    ("number", "moment", "processes"),
    [
        # The demo, its server, the server's supervisor, and a worker that starts.
        (signal.SIGINT, "4 files", 4),
        # Also a scheduler, and the work-horse that waits.
        (signal.SIGTERM, "continues", 6),
        (signal.SIGKILL, "continues", 6),
    ],
)
def test_ended_demo_leaves_no_process_and_no_file(
    number: signal.Signals, moment: str, processes: int, tree: Path
) -> None:
    assert_leaves_nothing("demo", "rq", tree, number=number, moment=moment, processes=processes)


class TestCommandLine:
    def test_both_demos_are_listed(self) -> None:
        shown = commands.run("--help").stdout
        assert re.search(r"\n  demo +Does", shown)
        assert re.search(r"\n  demo rq +Does", shown)

    @pytest.mark.parametrize(
        ("words", "usage"),
        [
            (["demo", "--help"], "Usage: squidstep demo [OPTIONS] [PATH]"),
            (["demo", "rq", "--help"], "Usage: squidstep demo rq [OPTIONS] [PATH]"),
            (["demo", "./rq", "--help"], "Usage: squidstep demo [OPTIONS] [PATH]"),
            (["rq"], "Usage: squidstep [OPTIONS] COMMAND [ARGS]..."),
        ],
    )
    def test_words_select_the_demo(self, words: list[str], usage: str) -> None:
        ended = commands.run(*words)
        assert usage in (ended.stdout + ended.stderr).splitlines()

    def test_an_rq_that_is_too_old_is_reported(self) -> None:
        script = "import sys, importlib.metadata as m; m.version = lambda name: '2.0'; "
        script += "sys.argv = ['squidstep', 'demo', 'rq']; from squidstep_redis.cli import main; main()"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("squidstep: squidstep_redis.rq needs RQ 2.1 or later")
