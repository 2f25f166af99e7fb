"""`squidstep` on a store that encrypts: with `--codec` it shows the payloads, without it says that it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import empty_store, invoke, options_of
from support.servers import find_binary

from squidstep_redis import StepRunStore
from squidstep_redis.codecs import EncryptedCodec
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.usefixtures("default_environment")

MODULE = """
from squidstep_redis.codecs import EncryptedCodec

codec = EncryptedCodec({"k": b"k" * 32}, current="k")
make = lambda: codec
number = 7


def broken():
    raise RuntimeError("no secret manager \\x1b[2J")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server


@pytest.fixture
def options(server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The options of a store with a failed step, a completed one and a history, all encrypted."""
    (tmp_path / "shop_settings.py").write_text(MODULE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with empty_store(server) as plain:
        store = StepRunStore(
            plain.client, prefix=plain.calls.prefix, codec=EncryptedCodec({"k": b"k" * 32}, current="k")
        )
        for step in ("pay", "mail"):
            store.fail_step(store.begin_step("run", step, {"card": "4111"}).step_run, ValueError("declined"))
        store.complete_step(store.begin_step("run", "pay", {"card": "4111"}).step_run, {"receipt": 7})
        yield options_of(server, store)


READING = [
    "show run",
    "show run --full",
    "show run pay",
    "timeline run",
    "failed",
    "failed --by-type",
    "runs",
    "watch run --once",
    "watch --once",
]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("command", READING)
def test_commands_without_the_codec_show_the_rest(options: list[str], command: str, as_json: bool) -> None:
    ended = invoke(*command.split(), *options, *(["--json"] if as_json else []))

    assert ended.stderr == ""
    assert "run" in ended.stdout or "pay" in ended.stdout
    assert "4111" not in ended.stdout
    if command not in ("timeline run", "runs", "failed --by-type") and not command.startswith("watch"):
        assert "cannot decode" in ended.stdout
    if as_json:
        assert json.loads("[" + ended.stdout.replace("}\n{", "},\n{") + "]")


@pytest.mark.parametrize("name", ["codec", "make"])
def test_commands_with_the_codec_show_the_payloads(options: list[str], name: str) -> None:
    options = [*options, "--codec", f"shop_settings:{name}"]

    shown = invoke("show", "run", *options).stdout
    assert '{"card": "4111"}' in shown
    assert '{"receipt": 7}' in shown
    assert "ValueError: declined" in invoke("show", "run", "pay", *options).stdout
    assert "ValueError: declined" in invoke("failed", *options).stdout
    assert "cannot decode" not in invoke("watch", "run", "--once", "--json", *options).stdout


def test_codec_can_be_named_by_the_environment(options: list[str]) -> None:
    assert "4111" in invoke("show", "run", *options, SQUIDSTEP_CODEC="shop_settings:codec").stdout


def test_export_and_import_use_the_codec(options: list[str], server: EmbeddedServer) -> None:
    line = invoke("export", "run", *options, "--codec", "shop_settings:codec").stdout
    assert "4111" in line
    assert "$encoded" in invoke("export", "run", *options).stdout

    with empty_store(server) as copy:
        ended = invoke("import", *options_of(server, copy), "--codec", "shop_settings:codec", input=line)
        assert ended.stdout == "imported run\n"
        assert b"4111" not in copy.client.hget(copy.calls.keys.run("run").keys.steps, "ipay")
        assert "4111" in invoke("show", "run", *options_of(server, copy), "--codec", "shop_settings:codec").stdout


def test_repairs_need_no_codec(options: list[str]) -> None:
    assert invoke("retry", "run", "--step", "mail", *options).stdout == "pending: mail of run\n"
    assert invoke("delete", "run", "--yes", *options).stdout == "deleted run\n"


@pytest.mark.parametrize("codec", [[], ["--codec", "shop_settings:codec"]], ids=["default", "encrypting"])
def test_doctor_goes_through_every_transition_with_the_codec(options: list[str], codec: list[str]) -> None:
    findings = json.loads(invoke("doctor", "--json", *options, *codec).stdout)["findings"]
    assert [each["level"] for each in findings if each["check"] == "self-test"] == ["ok"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shop_settings", "MODULE:NAME"),
        ("no_such_module:codec", "no_such_module"),
        ("shop_settings:nothing", "nothing"),
        ("shop_settings:number", "must have encode() and decode()"),
        ("shop_settings:broken", "no secret manager \\x1b[2J"),
    ],
)
def test_codec_that_cannot_be_loaded_is_reported(options: list[str], name: str, problem: str) -> None:
    ended = invoke("show", "run", *options, "--codec", name)

    assert ended.exit_code == 2
    assert "--codec" in ended.stderr
    assert problem in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
