"""`squidstep`: the commands as they are run, by people in a terminal and by monitoring; their exit codes above all."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result
from support.demos import SQUIDSTEP, run
from support.servers import EmbeddedCluster, find_binary

from squidstep_redis import Level
from squidstep_redis.cli import group
from squidstep_redis.embedded import EmbeddedServer

SOUND = {"appendonly": "yes", "appendfsync": "always", "maxmemory": "100mb"}
NOBODY = "redis://127.0.0.1:1"  # where nothing listens
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "SQUIDSTEP_REDIS_URL", "RQ_REDIS_URL", "SQUIDSTEP_PREFIX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), options=SOUND, port=0) as server:
        yield server


def invoke(*arguments: str, input: str | None = None, **environment: str) -> Result:
    result = CliRunner().invoke(group(), list(arguments), input=input, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def diagnosed(*arguments: str, **environment: str) -> dict[str, Any]:
    result = invoke("doctor", "--json", *arguments, **environment)
    diagnosis = json.loads(result.stdout)
    assert result.exit_code == Level[diagnosis["level"].upper()]
    return diagnosis


def in_a_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """What a command shows on a terminal that is so wide."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment}
    shown = b""
    with subprocess.Popen([SQUIDSTEP, *arguments], stdout=theirs, env=environment):
        os.close(theirs)
        with contextlib.suppress(OSError):  # so Linux says that the other end is closed
            while part := os.read(ours, 10_000):
                shown += part
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


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
    def test_its_exit_code(self, binary: Path, options: dict[str, str], rights: str, level: Level) -> None:
        with EmbeddedServer(binary=binary, options=options, port=0) as server:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command(f"ACL SETUSER monitor on >secret ~* {rights}")
            url = f"redis://monitor:secret@{server.host}:{server.port}/0"
            ended = run("doctor", "--url", url)
            assert diagnosed("--url", url)["level"] == level.name.lower()
        assert (ended.returncode, ended.stderr) == (level, "")
        assert "secret" not in ended.stdout

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_no_server_is_a_failure_and_no_traceback(self, options: list[str]) -> None:
        ended = run("doctor", "-u", NOBODY, *options)
        assert (ended.returncode, ended.stderr) == (2, "")
        assert "Connection refused" in ended.stdout
        assert "Is the server running" in ended.stdout

    def test_its_json(self, server: EmbeddedServer) -> None:
        diagnosis = diagnosed("--url", server.url)
        assert (diagnosis["url"], diagnosis["prefix"], diagnosis["level"]) == (server.url, "squidstep", "ok")
        for finding in diagnosis["findings"]:
            assert finding.keys() == {"check", "level", "message", "server"}
            assert finding["level"] == "ok"

    def test_in_a_pipe_a_finding_is_a_line_without_colours(
        self, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")  # which some shells export
        ended = run("doctor", "-u", server.url, "--lease", 30, "--job-timeout", 180)
        head, *findings, counts = ended.stdout.splitlines()
        assert head == f"{server.url}, prefix squidstep"
        assert re.match(r"warning  lease  .*the 180 s that the work may take: .*extend it$", findings[0])
        assert len(findings) == 12
        assert all(re.match(r"ok       [a-z]", line) for line in findings[1:])
        assert counts == "1 warning, 11 ok"
        assert not re.search(r"\x1b| $", ended.stdout, re.MULTILINE)

    @pytest.mark.parametrize("columns", [80, 140])
    def test_on_a_terminal_it_is_folded_and_in_colour(self, server: EmbeddedServer, columns: int) -> None:
        shown = in_a_terminal(columns, "doctor", "-u", server.url, "--lease", "30", "--job-timeout", "180")
        assert "\x1b[33mwarning" in shown
        lines = ANSI.sub("", shown).splitlines()
        assert max(map(len, lines)) <= columns
        assert len([line for line in lines if line.startswith(" ")]) >= 1  # the warning goes on in its own column

    def test_no_color(self, server: EmbeddedServer) -> None:
        shown = in_a_terminal(80, "doctor", "-u", server.url, "--lease", "1", NO_COLOR="1")
        assert "warning" in shown
        assert not re.search(r"\x1b\[(3[0-9]|9[0-7])", shown)

    def test_a_cluster_is_known_by_its_answer(self) -> None:
        with EmbeddedCluster(options=SOUND) as cluster:
            nodes = [f"{node.host}:{node.port}" for node in cluster.nodes]
            diagnosis = diagnosed("-u", cluster.nodes[1].url)
            shown = invoke("doctor", "-u", cluster.url).stdout
            with redis.Redis.from_url(cluster.url) as client:
                client.execute_command("CONFIG", "SET", "appendfsync", "no")
            told_of_one = invoke("doctor", "-u", cluster.url).stdout.splitlines()
        assert diagnosis["level"] == "ok"
        for check in ("self-test", "cluster", "eviction"):
            assert {each["server"] for each in diagnosis["findings"] if each["check"] == check} == set(nodes)
        assert re.search(r"^ok +self-test +all 3 nodes +a scratch run", shown, re.MULTILINE)
        assert re.match(rf"warning +persistence +{nodes[0]} +", told_of_one[1])

    def test_a_cluster_that_has_no_slots_yet(self) -> None:
        with EmbeddedServer(binary=find_binary("valkey"), options={"cluster-enabled": "yes"}, port=0) as server:
            ended = run("doctor", "-u", server.url)
        assert (ended.returncode, ended.stderr) == (2, "")
        assert "the cluster cannot be used: none of its slots is served" in ended.stdout

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--url", "nonsense"], "--url"),
            (["--url", "redis://:secret@127.0.0.1:1?sokket_timeout=1"], "sokket_timeout"),
            (["--url", "redis://127.0.0.1:x"], "--url"),
            (["--url", "redis://:secret/@127.0.0.1"], "Port could not be cast"),  # a slash wants to be %2F
            (["--prefix", "{"], "--prefix"),
            (["--lease", "-1"], "lease"),
            (["--lease", "soon"], "--lease"),
        ],
    )
    def test_what_it_refuses(self, server: EmbeddedServer, arguments: list[str], said: str) -> None:
        ended = run("doctor", "--url", server.url, *arguments)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr
        assert "secret" not in ended.stderr


class TestWhere:
    @pytest.mark.parametrize(
        ("arguments", "environment", "url"),
        [
            ([], {}, "redis://localhost:6379"),
            ([], {"RQ_REDIS_URL": "redis://rq"}, "redis://rq"),
            ([], {"RQ_REDIS_URL": "redis://rq", "SQUIDSTEP_REDIS_URL": "redis://ours"}, "redis://ours"),
            (["-u", "redis://given"], {"SQUIDSTEP_REDIS_URL": "redis://ours"}, "redis://given"),
            (["-u", "rediss://user:p@ss:word@h"], {}, "rediss://user:***@h"),
            (["-u", "redis://h?password=x&db=1"], {}, "redis://h?password=***&db=1"),
        ],
    )
    def test_the_url(
        self, arguments: list[str], environment: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Nothing is asked of the network: each of these names would be looked up.
        def refuse(self: object, *_: object) -> None:
            raise redis.ConnectionError("not here")

        monkeypatch.setattr(redis.connection.AbstractConnection, "connect", refuse)
        assert diagnosed(*arguments, **environment)["url"] == url

    def test_the_prefix(self, server: EmbeddedServer) -> None:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL SETUSER billing on >secret ~billing:* +@all")
        url = f"redis://billing:secret@{server.host}:{server.port}/0"
        assert diagnosed("-u", url)["level"] == "failure"
        assert diagnosed("-u", url, SQUIDSTEP_PREFIX="billing")["level"] == "ok"
        assert diagnosed("-u", url, "--prefix", "billing", SQUIDSTEP_PREFIX="other")["level"] == "ok"


class TestTheCommandLine:
    def test_every_command_has_help_with_its_options(self) -> None:
        listed = invoke("--help").stdout
        for name in ("demo", "demo rq", "doctor"):
            assert re.search(rf"^  {name}  +[A-Z]", listed, re.MULTILINE)
        shown = invoke("doctor", "--help").stdout
        assert "Example: squidstep doctor -u redis://" in shown
        assert re.search(r"^ +3 +nothing is wrong as far as the server tells", shown, re.MULTILINE)

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
    def test_without_the_extra_that_brings(self, missing: str, arguments: list[str], extra: str) -> None:
        ended = run_without(missing, *arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == f"squidstep: {missing} is not installed: pip install 'squidstep_redis[{extra}]'\n"

    def test_without_rq_the_other_commands_work(self, server: EmbeddedServer) -> None:
        assert run_without("rq", "doctor", "-u", server.url).returncode == 0
        listed = run_without("rq", "--help")
        assert (listed.returncode, listed.stderr) == (0, "")
        assert re.search(r"^  demo rq +\(rq is not installed: pip install", listed.stdout, re.MULTILINE)
        assert re.search(r"^  doctor +Says", listed.stdout, re.MULTILINE)

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_shells_complete_it(self, shell: str) -> None:
        def completed(words: str, position: int) -> str:
            environment = {**os.environ, "_SQUIDSTEP_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
            environment["COMP_CWORD"] = words.rsplit(maxsplit=1)[-1] if shell == "fish" else str(position)
            return subprocess.run([SQUIDSTEP], env=environment, capture_output=True, text=True, check=True).stdout

        assert "doctor" in completed("squidstep do", 1)
        assert "--job-timeout" in completed("squidstep doctor --jo", 2)


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.modules['{module}'] = None; sys.argv[0] = 'squidstep'"
    script += "; from squidstep_redis.cli import main; main()"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
