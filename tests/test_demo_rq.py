"""`squidstep demo rq`: the real command on real RQ workers, its check, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click import ClickException
from rich.console import Console
from rq import Queue, Worker
from rq.job import JobStatus
from support.demos import SQUIDSTEP, plant, run, running_in, until_line
from support.servers import wait_until

from squidstep_redis import StepRunStore
from squidstep_redis.demo import rq as demo_rq
from squidstep_redis.demo import rq_supervisor as demo_rq_supervisor
from squidstep_redis.demo import work as demo_work
from squidstep_redis.demo.rq_supervisor import Supervisor
from squidstep_redis.demo.rq_worker import Report
from squidstep_redis.demo.stage import Stage
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return plant(tmp_path)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for temporary files whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


def start(*arguments: object, temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SQUIDSTEP, "demo", "rq", *map(str, arguments)],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def test_on_a_server_of_ones_own(tree: Path, server: EmbeddedServer, temporary: Path) -> None:
    client: Any = redis.Redis.from_url(server.url)
    theirs = {b"rq:workers": b"rq:worker:mine", b"rq:queues": b"rq:queue:mine"}
    for key, member in theirs.items():
        client.sadd(key, member)
    client.hset("rq:scheduler:mine", "queues", "mine")
    client.zadd("rq:scheduler:scheduled_jobs", {"of another package": 1})

    with start(tree, "--url", server.url, "--json", temporary=temporary) as process:
        shown, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    result = json.loads(shown)
    assert (result["ok"], result["problems"]) == (True, [])
    assert (result["files"], result["steps"], result["steps_executed"], result["jobs_finished"]) == (4, 12, 12, 4)
    assert (result["effects_begun"], result["effects_ended"]) == (14, 12)
    assert (result["takeovers"], result["enqueued_twice"], result["requeued"]) == (2, 1, 1)
    assert result["workers_restarted"] >= 2
    assert result["told_to_wait"] >= 1
    assert result["deliveries"] >= 4 + 1 + 1 + 3
    assert [(killed["killed"], killed["run_id"], killed["step"]) for killed in result["killed_inside"]] == [
        ("horse", "b/one.py", "compress"),
        ("worker", "b/two.txt", "count"),
        ("worker and horse", "c/empty.py", "digest"),
    ]
    outcomes = [[attempt["outcome"] for attempt in killed["attempts"]] for killed in result["killed_inside"]]
    assert outcomes == [["lease_expired", "completed"], ["completed"], ["lease_expired", "completed"]]

    assert running_in(temporary) == set()
    assert list(temporary.iterdir()) == []
    wait_until(lambda: not client.exists("rq:clean_groups"))  # a lock of RQ's, for a second
    assert set(client.keys()) == {*theirs, b"rq:scheduler:mine", b"rq:scheduler:scheduled_jobs"}
    assert {key: client.smembers(key) for key in theirs} == {key: {member} for key, member in theirs.items()}
    client.close()


def test_a_wrong_output_fails_the_command_and_keys_are_kept(
    tree: Path, server: EmbeddedServer, temporary: Path
) -> None:
    with start(tree, "--url", server.url, "--keep", temporary=temporary) as process:
        assert process.stdout is not None
        head = process.stdout.readline()
        assert head.startswith("4 files, 12 steps, 2 workers of RQ ")
        prefix = head.split()[-1]
        until_line(process, "was killed inside count of b/two.txt, its work-horse")
        (tree / "b/two.txt").write_text("other words\n")  # its digest is stored
        until_line(process, "count of b/two.txt was delivered again")
        until_line(process, "whose worker is dead, completed count of b/two.txt")
        shown = process.stdout.read()
    assert process.returncode == 1
    assert "FAILED" in shown
    assert "b/two.txt: stored is" in shown
    assert "b/two.txt: its job is finished, with {'sha256'" in shown

    client: Any = redis.Redis.from_url(server.url)
    with StepRunStore.from_url(server.url, prefix=prefix) as store:
        assert store.completed_steps("a.py") == ["digest", "compress", "count"]
    queue: Any = Queue(prefix, connection=client)
    assert sorted(queue.finished_job_registry.get_job_ids()) == [f"{prefix}-{number}" for number in range(4)]
    assert queue.fetch_job(f"{prefix}-0").return_value() == {
        name: value for _, _, output in demo_work.sequential(tree / "a.py") for name, value in output.items()
    }
    assert Worker.all(connection=client) == []
    assert {client.ttl(key) for key in client.scan_iter(f"{prefix}:*")} == {-1}
    assert {client.ttl(key) for key in client.scan_iter(f"rq:job:{prefix}*")} == {-1}
    assert list(client.scan_iter("rq:*worker*")) == list(client.scan_iter("rq:*scheduler*")) == []
    client.close()


def test_what_the_check_finds(tree: Path, server: EmbeddedServer) -> None:
    settings = {"url": server.url, "prefix": "sabotaged"}
    with StepRunStore.from_url(**settings) as store:
        console = Console(quiet=True)
        stage = Stage(demo_work.find_files(tree, 100), 2, "sabotaged", settings, True, store, console, "here")
        supervisor = Supervisor(stage)
        supervisor.run()
        assert demo_rq.check(stage, supervisor) == []

        supervisor.tally.begun["a.py", "count"] += 1
        assert demo_rq.check(stage, supervisor) == ["a.py: count was begun 2 times and ended 1 times"]
        supervisor.tally.begun["a.py", "count"] -= 1
        supervisor.tally.counts["takeovers"] += 1
        assert demo_rq.check(stage, supervisor) == ["there were 3 takeovers, not 2"]
        supervisor.tally.counts["takeovers"] -= 1
        delivered, supervisor.tally.counts["delivered"] = supervisor.tally.counts["delivered"], 6
        assert demo_rq.check(stage, supervisor) == [
            "6 times a job was enqueued, 3 were killed: RQ delivered 6 times, which is too few"
        ]
        supervisor.tally.counts["delivered"] = delivered

        steps = next(key for key in store.client.scan_iter("*:a.py:steps"))
        wrong = {"result": {"lines": 1, "words": 1}}
        right = store.client.hget(steps, "ocount")
        store.client.hset(steps, "ocount", store.calls.payloads.encode("output", wrong))
        outputs, order = demo_rq.check(stage, supervisor)
        assert outputs.startswith("a.py: stored is")
        assert order.startswith("a.py: completed, in this order, are")
        store.client.hset(steps, "ocount", right)

        supervisor.queue.fetch_job("sabotaged-0").set_status(JobStatus.FAILED)
        assert [problem[:25] for problem in demo_rq.check(stage, supervisor)] == ["a.py: its job is failed, "]
        supervisor.queue.fetch_job("sabotaged-0").delete()
        assert demo_rq.check(stage, supervisor) == ["a.py: its job is gone"]

        store.delete_run("b/two.txt")
        problems = demo_rq.check(stage, supervisor)
        assert "b/two.txt: the attempts at count, when a worker was killed, are []" in problems


class TestWhenNothingWorks:
    @pytest.fixture
    def stage(self, tree: Path, server: EmbeddedServer) -> Iterator[Stage]:
        settings = {"url": server.url, "prefix": "idle"}
        with StepRunStore.from_url(**settings) as store:
            yield Stage({"a.py": tree / "a.py"}, 2, "idle", settings, True, store, Console(quiet=True), "here")

    def test_workers_that_end_again_and_again(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo_rq_supervisor, "work", end_at_once)
        monkeypatch.setattr(demo_rq_supervisor, "MAX_RESTARTS", 1)
        with pytest.raises(ClickException, match=r"again and again; worker-\d pid \d+ ended by itself, .* code 7"):
            Supervisor(stage).run()

    def test_workers_that_do_nothing(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo_rq_supervisor, "work", do_nothing)
        monkeypatch.setattr(demo_rq_supervisor, "PATIENCE", 0.5)
        with pytest.raises(ClickException, match="no RQ worker has done anything for"):
            Supervisor(stage).run()


def end_at_once(*_: object) -> None:
    sys.exit(7)


def do_nothing(*_: object) -> None:
    time.sleep(100)


def test_a_report_is_one_write() -> None:
    report = Report("completed", "worker-9999", 2**31, 2**31, "compress", 2**31)
    assert len(pickle.dumps(report)) < 512 - 8  # what POSIX promises, and what multiprocessing adds


@pytest.mark.parametrize(
    ("number", "moment", "status", "said"),
    [
        (signal.SIGINT, "4 files", 130, "squidstep: ended by SIGINT\n"),  # the workers are starting
        (signal.SIGTERM, "lives on", 143, "squidstep: ended by SIGTERM\n"),
        (signal.SIGKILL, "lives on", -signal.SIGKILL, ""),
    ],
)
def test_nothing_is_left_after(
    number: signal.Signals, moment: str, status: int, said: str, tree: Path, temporary: Path
) -> None:
    with start(tree, temporary=temporary) as process:
        until_line(process, moment)
        # A supervisor, its server, a tracker, a worker, and the demo itself. Later also a scheduler and a horse.
        wait_until(lambda: len(running_in(temporary)) >= (5 if moment == "4 files" else 7))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.stderr is not None
        complaint = process.stderr.read()
        # A worker that loses its parent while it starts complains in Python's own words: that is nobody's fault.
        assert (complaint, process.wait(10)) == (complaint if number == signal.SIGKILL else said, status)
        wait_until(lambda: not running_in(temporary), 5)
        wait_until(lambda: not list(temporary.iterdir()))


class TestTheCommandLine:
    def test_both_are_listed(self) -> None:
        shown = run("--help").stdout
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
    def test_which_is_meant(self, words: list[str], usage: str) -> None:
        ended = run(*words)
        assert usage in (ended.stdout + ended.stderr).splitlines()

    def test_an_rq_that_is_too_old(self) -> None:
        script = "import sys, importlib.metadata as m; m.version = lambda name: '2.0'; "
        script += "sys.argv = ['squidstep', 'demo', 'rq']; from squidstep_redis.cli import main; main()"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith("squidstep: squidstep_redis.rq needs RQ 2.1 or later")
