"""The fixtures in a separate pytest process, as in a project that has installed the library."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import redis
from support.servers import find_binary

from squidstep_redis.embedded import EmbeddedServer

from .test_guide import ran

EMPTY = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_it(step_store, number):
    assert step_store.get_run("run") == []
    assert step_store.begin_step("run", "pay", {}).decision == "execute"
"""
ASYNC = """
import asyncio
import pytest

async def no_work(input):
    raise AssertionError(input)

async def work(store):
    claim, decision = await store.begin_step("run", "pay", {"n": 1}, lease=30)
    assert decision == "execute"
    await store.complete_step(claim, {"n": 2})
    return await store.run_step("run", "pay", no_work, {"n": 1})

def test_by_asyncio_run(async_step_store, step_store):
    assert asyncio.run(work(async_step_store)) == {"n": 2}
    assert step_store.step_statuses("run") == {"pay": "completed"}

def test_in_one_loop_after_another(async_step_store):
    asyncio.run(work(async_step_store))
    assert asyncio.run(async_step_store.completed_steps("run")) == ["pay"]

@pytest.mark.asyncio
async def test_by_pytest_asyncio(async_step_store):
    assert await work(async_step_store) == {"n": 2}

@pytest.mark.anyio
async def test_by_anyio(async_step_store, anyio_backend):
    assert await work(async_step_store) == {"n": 2}

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""
OVERRIDING = """
import pytest

@pytest.fixture
def step_settings():
    return {"max_payload_bytes": 10}
"""
OVERRIDDEN = """
import pytest
from squidstep_redis import PayloadTooLargeError

def test_it(step_store):
    with pytest.raises(PayloadTooLargeError):
        step_store.begin_step("run", "pay", {"text": "x" * 20})
"""
FAULTS = """
def test_it(step_store, step_faults):
    step_faults.lose_reply("complete_step")
    step_store.begin_step("run", "pay", {})

def test_canceled(step_store, step_faults):
    step_faults.lose_reply("complete_step")
    step_faults.heal()
"""
ENDED = """
import pytest

def test_skipped(step_store, step_faults):
    step_faults.lose_reply("complete_step")
    pytest.skip("no card reader")

def test_failed(step_store, step_faults):
    step_faults.lose_reply("complete_step")
    raise KeyError

@pytest.mark.xfail(strict=True)
def test_known_to_fail(step_store, step_faults):
    step_faults.lose_reply("complete_step")
    raise KeyError
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of one run of all files: to start pytest takes longer than the tests."""
    directory = tmp_path_factory.mktemp("plugin")
    (directory / "overridden").mkdir()
    (directory / "overridden" / "conftest.py").write_text(OVERRIDING, "utf-8")
    (directory / "overridden" / "test_overridden.py").write_text(OVERRIDDEN, "utf-8")
    for name, source in (("empty", EMPTY), ("async", ASYNC), ("faults", FAULTS), ("ended", ENDED)):
        (directory / f"test_{name}.py").write_text(source, "utf-8")
    return ran(directory, "-rA")


def outcomes(output: str, file: str) -> dict[str, int]:
    """Returns how often each outcome occurs in a file, by the summary at the end."""
    return Counter(re.findall(rf"^([A-Z]+) (?:\[1\] )?{re.escape(file)}(?:::|:\d+: )", output, re.MULTILINE))


def test_each_test_gets_an_empty_store(output: str) -> None:
    assert outcomes(output, "test_empty.py") == {"PASSED": 3}


def test_asyncio_store_works_under_every_runner(output: str) -> None:
    assert outcomes(output, "test_async.py") == {"PASSED": 4}


def test_asyncio_store_works_on_an_embedded_server(tmp_path: Path) -> None:
    (tmp_path / "test_async.py").write_text(ASYNC, "utf-8")
    assert "4 passed" in ran(tmp_path, "--squidstep-server", "embedded")


def test_existing_keys_of_a_server_are_kept(tmp_path: Path) -> None:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server, redis.Redis.from_url(server.url) as client:
        client.set("other", 1)
        source = """
def test_it(step_store, step_clock):
    claim = step_store.begin_step("run", "pay", {}, lease=3600).step_run
    step_clock.advance(3600)
    assert step_store.begin_step("run", "pay", {}).takeover
    assert step_store.client.keys("squidstep-test-*")
"""
        (tmp_path / "pytest.ini").write_text(f"[pytest]\nsquidstep_server = {server.url}\n", "utf-8")
        (tmp_path / "test_it.py").write_text(source, "utf-8")
        assert "1 passed" in ran(tmp_path)
        assert client.keys() == [b"other"]


def test_conftest_can_override_the_settings(output: str) -> None:
    assert outcomes(output, "overridden/test_overridden.py") == {"PASSED": 1}


def test_fault_that_did_not_occur_is_an_error(output: str) -> None:
    assert outcomes(output, "test_faults.py") == {"PASSED": 2, "ERROR": 1}
    assert "faults that the test requested did not occur: lose_reply('complete_step')" in output


def test_skipped_or_failed_test_has_no_further_error(output: str) -> None:
    assert outcomes(output, "test_ended.py") == {"FAILED": 1, "SKIPPED": 1, "XFAIL": 1}


def test_plugin_does_not_import_the_library() -> None:
    """pytest loads the plugin in every project, also where no test uses it."""
    code = "import sys, squidstep_redis.pytest_plugin; print({'redis', 'fakeredis', 'msgpack'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
