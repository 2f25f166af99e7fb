"""`squidstep web`, and the files that the page needs in addition to its code."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.backends import Backend
from support.commands import run

from squidstep_redis.cli.web import listen

REPOSITORY = Path(__file__).parents[2]
CLOSED_PORT = "redis://127.0.0.1:1"


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Runs the command; provides its process, and the port that it has printed."""
    command = [sys.executable, "-m", "squidstep_redis.cli", "web", "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r":(\d+)/", line)
            assert match, f"{line!r} {process.stderr.read() if process.stderr else ''}"
            yield process, int(match[1])
        finally:
            process.kill()


def get(port: int, path: str, host: str = "localhost") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


@pytest.mark.servers("valkey", "cluster")
class TestCommand:
    def test_it_serves_the_page_on_loopback_until_it_is_stopped(self, backend: Backend) -> None:
        assert backend.url is not None
        with serving("-u", backend.url, "--prefix", "web-command") as (process, port):
            status, body = get(port, "/")
            assert status == 200
            assert "There is no run yet." in body
            assert get(port, "/", "evil.example")[0] == 421
            stream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            stream.request("GET", "/events")
            assert stream.getresponse().status == 200  # an open stream does not delay the end
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            stream.close()
        assert process.returncode == 130
        assert errors == "squidstep: terminated by SIGINT\n"

    def test_rights_and_names_are_options(self, backend: Backend) -> None:
        assert backend.url is not None
        options = ("--payloads", "--actions", "--allow-host", "steps.example")
        with serving("-u", backend.url, "--prefix", "web-command", *options) as (_, port):
            assert get(port, "/payload?run=a&step=b&name=input")[0] == 404
            assert get(port, "/", "steps.example")[0] == 200


@pytest.mark.servers("valkey")
def test_an_address_that_others_can_reach_is_a_warning(backend: Backend) -> None:
    assert backend.url is not None
    with serving("-u", backend.url, "--host", "0.0.0.0", "--actions") as (process, port):
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert errors.splitlines()[0] == (f"squidstep: warning: anyone who can reach 0.0.0.0, port {port}, can change runs")


def test_pages_are_sent_without_delay() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("host", ["192.0.2.1", "a..b"])
def test_an_address_that_cannot_be_used_is_reported(backend: Backend, host: str) -> None:
    ended = run("web", "-u", backend.url, "--host", host, "--port", "0")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"squidstep: cannot listen on {host}, port 0: ")


def test_an_unreachable_server_is_exit_code_2() -> None:
    ended = run("web", "-u", CLOSED_PORT, "--port", "0")
    assert ended.returncode == 2
    assert ended.stderr.startswith("squidstep: ")


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError('No module named jinja2', name='jinja2')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    command = [sys.executable, "-m", "squidstep_redis.cli", "web", "--port", "0"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ended.stderr == "squidstep: jinja2 is not installed: pip install 'squidstep_redis[web]'\n"


def test_the_app_without_its_extra_names_it(tmp_path: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError('No module named starlette', name='starlette')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    command = [sys.executable, "-c", "import squidstep_redis.web"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert "squidstep_redis.web needs Starlette and Jinja: pip install 'squidstep_redis[web]'" in ended.stderr


def test_it_works_from_a_zip_archive(tmp_path: Path) -> None:
    archive = tmp_path / "library.zip"
    with zipfile.ZipFile(archive, "w") as library:
        for folder, at in (
            (REPOSITORY / "squidstep_redis", "squidstep_redis"),
            (REPOSITORY / "lua", "squidstep_redis/lua"),
        ):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    library.write(path, f"{at}/{path.relative_to(folder)}")
    code = (
        "import squidstep_redis as s; from squidstep_redis.web import web_app; "
        "assert s.__file__.startswith(__import__('sys').path[0]); "
        "print(web_app(s.AsyncStepRunStore.from_url('redis://localhost')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(archive)}
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.stderr == ""
    assert "Starlette" in ended.stdout
