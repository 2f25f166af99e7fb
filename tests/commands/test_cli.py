"""`squidstep`: options, extras, help and completion, and the exit codes of `doctor` for people and for monitoring."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from support.commands import (
    ANSI,
    CLOSED_PORT,
    complete,
    empty_store,
    invoke,
    on_terminal,
    options_of,
    run,
    run_encoded,
    run_on_terminal,
)
from support.demos import SQUIDSTEP
from support.records import in_batch
from support.servers import EmbeddedCluster, find_binary

from squidstep_redis import Level, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.usefixtures("default_environment")

SOUND = {"appendonly": "yes", "appendfsync": "always", "maxmemory": "100mb"}


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), options=SOUND, port=0) as server:
        yield server


def diagnose(*arguments: str, **environment: str) -> dict[str, Any]:
    result = invoke("doctor", "--json", *arguments, **environment)
    diagnosis = json.loads(result.stdout)
    assert result.exit_code == Level[diagnosis["level"].upper()]
    return diagnosis


class TestDoctor:
    @pytest.mark.parametrize(
        ("options", "rights", "level"),
        [
            (SOUND, "+@all", Level.OK),
            ({**SOUND, "appendfsync": "everysec"}, "+@all", Level.WARNING),
            ({**SOUND, "maxmemory-policy": "allkeys-lru"}, "+@all", Level.FAILURE),
            ({**SOUND, "maxmemory-policy": "allkeys-lru"}, "+@all -config", Level.FAILURE),
            (SOUND, "+@all -config", Level.UNKNOWN),
        ],
    )
    def test_the_exit_code_is_the_worst_level(
        self, binary: Path, options: dict[str, str], rights: str, level: Level
    ) -> None:
        with EmbeddedServer(binary=binary, options=options, port=0) as server:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command(f"ACL SETUSER monitor on >secret ~* {rights}")
            url = f"redis://monitor:secret@{server.host}:{server.port}/0"
            ended = run("doctor", "--url", url)
            assert diagnose("--url", url)["level"] == level.name.lower()
        assert (ended.returncode, ended.stderr) == (level, "")
        assert "secret" not in ended.stdout

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_an_unreachable_server_is_a_failure_without_traceback(self, options: list[str]) -> None:
        ended = run("doctor", "-u", CLOSED_PORT, *options)
        assert (ended.returncode, ended.stderr) == (2, "")
        assert "Connection refused" in ended.stdout

    def test_json_has_every_finding(self, server: EmbeddedServer) -> None:
        diagnosis = diagnose("--url", server.url)
        assert (diagnosis["server"], diagnosis["prefix"], diagnosis["level"]) == (
            f"{server.host}:{server.port}, database 0",
            "squidstep",
            "ok",
        )
        for finding in diagnosis["findings"]:
            assert finding.keys() == {"check", "level", "message", "server"}
            assert finding["level"] == "ok"

    def test_in_a_pipe_each_finding_is_one_plain_line(
        self, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")  # some shells export it
        ended = run("doctor", "-u", server.url, "--lease", 30, "--job-timeout", 180)
        head, *findings, counts = ended.stdout.splitlines()
        assert head == f"{server.host}:{server.port}, database 0, prefix squidstep"
        assert re.match(r"warning  lease  .*180 s", findings[0])
        assert len(findings) == 12
        assert all(re.match(r"ok       [a-z]", line) for line in findings[1:])
        assert counts == "1 warning, 11 ok"
        assert not re.search(r"\x1b| $", ended.stdout, re.MULTILINE)

    @pytest.mark.parametrize("columns", [80, 140])
    def test_on_a_terminal_findings_are_folded_and_colored(self, server: EmbeddedServer, columns: int) -> None:
        shown = on_terminal(columns, "doctor", "-u", server.url, "--lease", "30", "--job-timeout", "180")
        assert "\x1b[33mwarning" in shown
        lines = ANSI.sub("", shown).splitlines()
        assert max(map(len, lines)) <= columns
        assert len([line for line in lines if line.startswith(" ")]) >= 1  # the rest of the warning stays in its column

    def test_real_terminal_shows_the_same(self, server: EmbeddedServer) -> None:
        arguments = ["doctor", "-u", server.url, "--lease", "30"]
        shown = (run_on_terminal(80, *arguments), on_terminal(80, *arguments))
        first, second = (re.sub(r"\d+", "#", each) for each in shown)  # some findings have a time or a count
        assert first == second

    def test_no_color_disables_colors(self, server: EmbeddedServer) -> None:
        shown = on_terminal(80, "doctor", "-u", server.url, "--lease", "1", NO_COLOR="1")
        assert "warning" in shown
        assert not re.search(r"\x1b\[(3[0-9]|9[0-7])", shown)

    def test_any_node_of_a_cluster_checks_all_nodes(self) -> None:
        with EmbeddedCluster(options=SOUND) as cluster:
            nodes = [f"{node.host}:{node.port}" for node in cluster.nodes]
            diagnosis = diagnose("-u", cluster.nodes[1].url)
            shown = invoke("doctor", "-u", cluster.url).stdout
            with redis.Redis.from_url(cluster.url) as client:
                client.execute_command("CONFIG", "SET", "appendfsync", "no")
            one_differs = invoke("doctor", "-u", cluster.url).stdout.splitlines()
        assert diagnosis["level"] == "ok"
        for check in ("self-test", "cluster", "eviction"):
            assert {each["server"] for each in diagnosis["findings"] if each["check"] == check} == set(nodes)
        assert re.search(r"^ok +self-test +all 3 nodes +a scratch run", shown, re.MULTILINE)
        assert re.match(rf"warning +persistence +{nodes[0]} +", one_differs[1])

    def test_a_cluster_without_slots_cannot_be_used(self) -> None:
        with EmbeddedServer(binary=find_binary("valkey"), options={"cluster-enabled": "yes"}, port=0) as server:
            ended = run("doctor", "-u", server.url)
        assert (ended.returncode, ended.stderr) == (2, "")
        assert "the cluster cannot be used: none of its slots is served" in ended.stdout

    @pytest.mark.parametrize("reply", [b"+OK", b":1", b"*1\r\n+OK"])
    def test_an_unreadable_reply_about_slots_is_reported(self, reply: bytes) -> None:
        with replying(reply + b"\r\n") as url:
            for command in ("doctor", "runs"):
                ended = run(command, "-u", url)
                assert ended.returncode == 2
                assert "CLUSTER SLOTS" in ended.stdout + ended.stderr

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--url", "nonsense"], "--url"),
            (["--url", "redis://:secret@127.0.0.1:1?sokket_timeout=1"], "sokket_timeout"),
            (["--url", "redis://127.0.0.1:x"], "--url"),
            (["--url", "redis://:secret/@127.0.0.1"], "write @ as %40, / as %2F"),
            (["--url", "redis://:top/secret@127.0.0.1:x"], "write @ as %40"),
            (["--url", "redis://:a?secret=1@127.0.0.1"], "write @ as %40"),
            (["--url", "//:secret@127.0.0.1"], "must be redis://"),
            (["--prefix", "{"], "--prefix"),
            (["--lease", "-1"], "lease"),
            (["--lease", "soon"], "--lease"),
        ],
    )
    def test_invalid_options_are_rejected_without_the_password(
        self, server: EmbeddedServer, arguments: list[str], expected: str
    ) -> None:
        ended = run("doctor", "--url", server.url, *arguments)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert expected in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "secret" not in ended.stderr


@contextlib.contextmanager
def replying(reply: bytes) -> Iterator[str]:
    """Runs a server that gives the same reply to everything; provides its URL."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    while connection.recv(10_000):
                        connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


class TestStoreOptions:
    @pytest.mark.parametrize(
        ("arguments", "environment", "server"),
        [
            ([], {}, "localhost:6379, database 0"),
            ([], {"RQ_REDIS_URL": "redis://rq"}, "rq:6379, database 0"),
            ([], {"RQ_REDIS_URL": "redis://rq", "SQUIDSTEP_REDIS_URL": "redis://ours"}, "ours:6379, database 0"),
            (["-u", "redis://given:1/2"], {"SQUIDSTEP_REDIS_URL": "redis://ours"}, "given:1, database 2"),
            (["-u", "rediss://us@er:p@ss:w%2Ford@h"], {}, "h:6379, database 0"),
            (["-u", "redis://h?pass%77ord=x&db=1"], {}, "h:6379, database 1"),
            (["-u", "redis://h?password=x\n&db=1"], {}, "h:6379, database 1"),
            (["-u", "unix:///run/redis.sock?password=x"], {}, "/run/redis.sock, database 0"),
        ],
    )
    def test_the_option_overrides_the_environment(
        self, arguments: list[str], environment: dict[str, str], server: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Without this each host name would be looked up.
        def refuse(self: object, *_: object) -> None:
            raise redis.ConnectionError("not here")

        monkeypatch.setattr(redis.connection.AbstractConnection, "connect", refuse)
        assert diagnose(*arguments, **environment)["server"] == server

    def test_the_prefix_decides_which_keys_are_used(self, server: EmbeddedServer) -> None:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL SETUSER billing on >secret ~billing:* +@all")
        url = f"redis://billing:secret@{server.host}:{server.port}/0"
        assert diagnose("-u", url)["level"] == "failure"
        assert diagnose("-u", url, SQUIDSTEP_PREFIX="billing")["level"] == "ok"
        assert diagnose("-u", url, "--prefix", "billing", SQUIDSTEP_PREFIX="other")["level"] == "ok"


class TestCommandLine:
    def test_help_lists_commands_options_and_exit_codes(self) -> None:
        listed = invoke("--help").stdout
        for name in ("demo", "demo rq", "doctor"):
            assert re.search(rf"^  {name}  +[A-Z]", listed, re.MULTILINE)
        assert not re.search(r"\w\.\.\.$", invoke("--help", COLUMNS="80").stdout, re.MULTILINE)  # no summary is cut
        shown = invoke("doctor", "--help").stdout
        assert "Example: squidstep doctor -u redis://" in shown
        assert re.search(r"^ +3 +no problem was found, but the server does not", shown, re.MULTILINE)

    @pytest.mark.parametrize(
        ("missing", "arguments", "extra"),
        [
            ("click", [], "cli"),
            ("click", ["doctor"], "cli"),
            ("click", ["demo"], "demo"),
            ("rich", ["doctor", "-u", "x"], "cli"),
            ("rich", ["demo", "--files", "3"], "demo"),
            ("rq", ["demo", "rq"], "demo"),
        ],
    )
    def test_a_missing_extra_is_named(self, missing: str, arguments: list[str], extra: str) -> None:
        ended = run_without(missing, *arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == f"squidstep: {missing} is not installed: pip install 'squidstep_redis[{extra}]'\n"

    def test_without_rq_other_commands_work(self, server: EmbeddedServer) -> None:
        assert run_without("rq", "doctor", "-u", server.url).returncode == 0
        listed = run_without("rq", "--help")
        assert (listed.returncode, listed.stderr) == (0, "")
        assert re.search(r"^  demo rq +\(rq is not installed: pip install", listed.stdout, re.MULTILINE)
        assert re.search(r"^  doctor +Checks", listed.stdout, re.MULTILINE)

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_shells_complete_commands_and_options(self, shell: str) -> None:
        assert "doctor" in complete(shell, "squidstep do")
        assert "timeline" in complete(shell, "squidstep tim")
        assert "--job-timeout" in complete(shell, "squidstep doctor --jo")
        assert "failed" in complete(shell, "squidstep runs --status f")

    def test_shells_complete_run_ids(self, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
        with empty_store(server) as store:
            for run in ("order-1", "order-2", "crawl \x1b"):
                store.schedule_step(run, "step", {})
            given = f"-u {server.url} --prefix {store.calls.prefix}"
            for command in ("show", "explain", "retry", "delete order-1", "export", "watch", "complete"):
                shown = complete("bash", f"squidstep {command} {given} or")
                assert shown.splitlines() == ["plain,order-1", "plain,order-2"]
            assert complete("bash", f"squidstep show {given} ").splitlines() == ["plain,order-1", "plain,order-2"]
            monkeypatch.setenv("SQUIDSTEP_REDIS_URL", server.url)
            assert "order-1" in complete("bash", f"squidstep show --prefix {store.calls.prefix} or")
        assert complete("bash", f"squidstep show -u {CLOSED_PORT} or").strip() == ""

    def test_completion_reads_one_page_of_the_index(self, server: EmbeddedServer) -> None:
        with empty_store(server) as store:
            in_batch(store, [store.calls.schedule_step(f"crawl-{number}", "step", {}) for number in range(2_000)])
            store.schedule_step("order-1", "step", {})
            in_batch(store, [store.calls.schedule_step(f"mail-{number}", "step", {}) for number in range(60)])
            given = f"-u {server.url} --prefix {store.calls.prefix}"
            newest = [summary.run_id for summary in store.runs(run_id_prefix="mail-", limit=50).runs]
            assert complete("bash", f"squidstep show {given} or").splitlines() == ["plain,order-1"]
            listed = complete("bash", f"squidstep show {given} mail-").splitlines()
        assert listed == [f"plain,{run_id}" for run_id in sorted(newest)]


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.modules['{module}'] = None; sys.argv[0] = 'squidstep'"
    script += "; from squidstep_redis.cli import main; main()"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)


class TestEncodings:
    """Output for a pipe whose encoding is not UTF-8, as on Windows, or in a cron job with an old locale."""

    COMMANDS = (
        *(
            "runs",
            "show Zoë",
            "show Zoë --json",
            "show Zoë charge --full",
            "timeline Zoë",
            "failed",
            "failed --by-type",
        ),
        *("export Zoë", "watch --once", "watch Zoë --once", "explain Zoë", "explain Zoë --json", "stuck", "stats"),
        *("explain ☠", "retry Zoë --dry-run", "delete Zoë --dry-run", "purge --older-than 0.001 --dry-run", "doctor"),
        *("cancel ☠", "complete Zoë ☠ --output {}", "fork ☠ Ω", "runs --cursor ☠", "runs --status ☠", "☠", "--help"),
    )

    @pytest.fixture
    def options(self, server: EmbeddedServer) -> Iterator[list[str]]:
        with StepRunStore.from_url(server.url, prefix="encodings") as store:
            claim = store.begin_step("Zoë", "charge ✓", {"name": "☠", "𝄞": "é"}, lease=60, owner="wörker").step_run
            store.fail_step(claim, ValueError("→ ☠"))
            yield options_of(server, store)

    @pytest.mark.parametrize(
        "encoding",
        ["cp1252", "ascii", "latin-1", "cp437", "koi8-r", "cp932", "iso2022_jp", "utf-16", "utf-8-sig", "utf-8"],
    )
    def test_every_character_is_shown_or_escaped(self, options: list[str], encoding: str) -> None:
        for command in self.COMMANDS:
            arguments = command.split() if command == "--help" else [*command.split(), *options]
            ended = run_encoded(encoding, *arguments)
            assert ended.returncode in (0, 1, 2), ended.stderr
            shown = ended.stdout.decode("ascii" if command.startswith("export") and encoding != "utf-8" else encoding)
            assert "Traceback" not in shown + ended.stderr.decode(encoding, "replace")
            if "Zoë" in command and ended.returncode == 0:
                assert any(name in shown for name in ("Zo\xeb", r"Zo\xeb", r"Zo\u00eb"))

    @pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16", "utf-8"])
    def test_exported_runs_can_be_imported(self, options: list[str], server: EmbeddedServer, encoding: str) -> None:
        exported = run_encoded(encoding, "export", "Zoë", *options).stdout
        imported = invoke("import", "-u", server.url, "--prefix", f"copy-{encoding}", input=exported)
        assert (imported.exit_code, imported.stdout) == (0, "imported Zoë\n")

    def test_encoding_of_the_environment_is_used(self, options: list[str]) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}
        ended = subprocess.run([SQUIDSTEP, "show", "Zoë", *options], capture_output=True, env=environment, check=False)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert "Zoë" in ended.stdout.decode("cp1252")
        assert r"\u2713" in ended.stdout.decode("cp1252")
