"""The README and the guides: each code block runs as a reader would run it, and each link resolves."""

from __future__ import annotations

import gc
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import prometheus_client.values
import pytest
import redis
from support.commands import run as invoke_command
from support.process_state import restored
from support.servers import find_binary

import squidstep_redis.celery.stores
import squidstep_redis.rq.stores
from squidstep_redis import Level, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "tests" / "guide").glob("*.md"))]
TESTING_GUIDE = REPOSITORY / "tests" / "guide" / "testing.md"  # tests/kit/test_guide.py runs it
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[tuple[int, str, str]]:
    """The code blocks in these languages: (first line, language, code)."""
    text = page.read_text("utf-8")
    found = [(text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in BLOCK.finditer(text)]
    return [(line, language, code) for line, language, code in found if language in languages]


@pytest.fixture
def url() -> Iterator[str]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server.url


@pytest.fixture
def module(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page as a module, so that its functions can be imported by name."""
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    # Pages configure these, and replace the class of the metrics' values.
    monkeypatch.setattr(squidstep_redis.rq.stores, "_stores", squidstep_redis.rq.stores.JobStores())
    monkeypatch.setattr(squidstep_redis.celery.stores, "_stores", squidstep_redis.celery.stores.TaskStores())
    monkeypatch.setattr(prometheus_client.values, "ValueClass", prometheus_client.values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with restored():
        yield module


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's result backend calls it
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != TESTING_GUIDE and blocks(page, "python")], ids=lambda page: page.name
)
def test_code_blocks_of_a_page_run_in_order(page: Path, module: ModuleType, url: str) -> None:
    address = url.removeprefix("redis://")
    run = {"python": run_python, "redis": run_redis, "console": run_console}
    if page == PAGES[0]:
        del run["console"]  # they install packages: CI runs them
    found = blocks(page, *run)
    assert found
    for line, language, code in found:
        run[language](code.replace("localhost:6379/0", address), page, line, module, url)
    module.store.close()
    with warnings.catch_warnings():
        # Celery's results unsubscribe when they are collected: the server must still be there. Its worker in a thread
        # leaves connections open.
        warnings.simplefilter("ignore", ResourceWarning)
        vars(module).clear()
        gc.collect()


def run_python(code: str, page: Path, line: int, module: ModuleType, url: str) -> None:
    """Executes the block in the namespace of the module."""
    # Preceding blank lines make a traceback show the line number of the page.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), module.__dict__)


def run_redis(code: str, page: Path, line: int, module: ModuleType, url: str) -> None:
    """Sends each line as a command, as redis-cli does."""
    with redis.Redis.from_url(url) as client:
        for command in code.splitlines():
            client.execute_command(*command.split())


def run_console(code: str, page: Path, line: int, module: ModuleType, url: str) -> None:
    """Runs each command and compares what it prints; "…" in the page matches any text."""
    for command, wanted in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", code, re.MULTILINE):
        program, *arguments = shlex.split(command)
        # In this process, unless it needs a shell: the process would take half a second to start.
        is_plain = program == "squidstep" and not re.search(r"[|<>;&$`]", command)
        ended = invoke_command(*arguments) if is_plain else run_in_shell(command)
        pattern = re.escape(wanted).replace("…", ".*")
        assert re.fullmatch(pattern, ended.stdout + ended.stderr), f"{page.name}:{line}: {ended}"


def run_in_shell(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("page", "options"),
    [
        (page, dict(line.split(maxsplit=1) for line in code.splitlines()))
        for page in PAGES
        for _, _, code in blocks(page, "conf")
    ],
)
def test_doctor_finds_no_problem_with_a_documented_configuration(page: Path, options: dict[str, str]) -> None:
    with (
        EmbeddedServer(binary=find_binary("valkey"), options=options) as server,
        StepRunStore.from_url(server.url) as store,
    ):
        findings = store.doctor().findings
    assert [finding for finding in findings if finding.level is not Level.OK] == []


def test_ci_runs_the_commands_of_the_readme() -> None:
    lines = [line for _, _, code in blocks(PAGES[0], "console") for line in code.splitlines()]
    assert len(lines) == 2
    assert all(line.startswith("$ python3 -m venv .venv && .venv/bin/pip install -e ") for line in lines)
    assert r"sed -n 's/^\$ //p' README.md" in (REPOSITORY / ".ci" / "run").read_text("utf-8")


def test_every_code_block_is_in_a_language_that_is_tested() -> None:
    for page in PAGES:
        shown = ["text"] if page == TESTING_GUIDE else []
        assert len(blocks(page, "python", "redis", "console", "conf", *shown)) == len(
            BLOCK.findall(page.read_text("utf-8"))
        )


def test_relative_links_resolve() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_package_index_shows_the_readme_without_relative_links() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["metadata"]["hooks"]
    text = PAGES[0].read_text("utf-8")
    for substitution in settings["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert re.findall(r"\]\((?!https?:)", text) == []
