"""The house rules: the headers of the scripts say what the code does, imports point one way, names are one."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import typing
from binascii import crc32
from pathlib import Path

import pytest

from squidstep_redis import AsyncStepRunStore, Calls, StepRunStore, keys, model
from squidstep_redis.base import BaseStore
from squidstep_redis.scripts import directory, script

PACKAGE = Path(inspect.getfile(model)).parent
LUA = directory()
SCRIPTS = sorted(path.stem for path in LUA.glob("*.lua"))

STORES = {"arguments", "base", "calls", "claims", "doctor", "errors", "heartbeats", "model", "wire"}
SENDERS = {"base", "connections", "sending", "wire"}

# design: the ground floor knows errors alone, the roof the public API alone.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": {"model", "wire"},  # for type checkers only
    "arguments": {"errors"},
    "codec": {"errors", "signals"},
    "keys": set(),
    "model": set(),
    "scripts": set(),
    "wire": {"errors", "scripts"},
    "sending": {"errors", "wire"},
    "records": {"codec", "errors", "model", "wire"},
    "operations": {"arguments", "codec", "errors", "keys", "records"},
    "transitions": {"arguments", "codec", "errors", "model", "operations", "scripts", "wire"},
    "reads": {"arguments", "errors", "keys", "model", "operations", "scripts", "wire"},
    "listing": {"arguments", "errors", "model", "operations", "scripts", "wire"},
    "repairs": {"arguments", "errors", "listing", "model", "operations", "scripts", "wire"},
    "documents": {"arguments", "codec", "errors", "model"},
    "transfers": {"arguments", "documents", "errors", "operations", "scripts", "wire"},
    "calls": {
        "arguments",
        "errors",
        "operations",
        "reads",
        "repairs",
        "scripts",
        "transfers",
        "transitions",
        "wire",
    },
    "connections": {"wire"},
    "events": {"errors", "model", "wire"},
    "base": {"arguments", "calls", "checks", "codec", "connections", "doctor", "errors", "events", "sending", "wire"},
    "signals": set(),
    "heartbeats": {"claims"},
    "claims": {"arguments", "calls", "errors", "model", "wire"},
    "checks": set(),
    "doctor": {"calls", "checks", "errors", "sending", "wire"},
    "sender": SENDERS,
    "aio_sender": SENDERS,
    "store": {*STORES, "sender", "signals"},
    "aio": {*STORES, "aio_sender"},
    "__init__": {"aio", "calls", "checks", "claims", "codec", "doctor", "errors", "events", "model", "store", "wire"},
    "embedded": set(),
    "cli": set(),  # it loads its commands by name
    "commands": set(),
    "commands.base": {""},
    "commands.doctor": {"", "commands.base"},
    "commands.texts": {"", "documents"},
    "commands.bars": {"", "commands.texts"},
    "commands.drawing": {"", "commands.bars", "commands.texts"},
    "commands.runs": {"", "commands.base", "commands.texts"},
    "commands.show": {"", "commands.base", "commands.texts"},
    "commands.timeline": {"", "commands.bars", "commands.base", "commands.drawing", "commands.texts"},
    "commands.watch": {"", "commands.base", "commands.show", "commands.texts"},
    "commands.stuck": {"", "commands.base", "commands.texts"},
    "commands.failed": {"", "commands.base", "commands.texts"},
    "commands.retry": {"", "commands.base", "commands.texts"},
    "commands.release": {"", "commands.base", "commands.texts"},
    "commands.delete": {"", "commands.base", "commands.texts"},
    "commands.purge": {"", "commands.base", "commands.texts"},
    "commands.export": {"commands.base"},
    "commands.import_": {"", "commands.base", "commands.texts", "documents"},
    "demo": set(),
    "demo.work": {""},
    "demo.process": set(),
    "demo.stage": {"", "demo.work", "embedded"},
    "demo.broker": {"", "demo.process", "demo.work"},
    "demo.plain": {"", "demo.broker", "demo.stage", "demo.work"},
    "demo.rq_worker": {"", "demo.process", "demo.work", "rq"},
    "demo.rq_supervisor": {"demo.process", "demo.rq_worker", "demo.stage", "demo.work"},
    "demo.rq": {"", "demo.rq_supervisor", "demo.stage", "demo.work"},
    "metrics": {""},
    "testing.clock": {"scripts"},
    "testing.tap": set(),
    "testing.faults": {"", "arguments", "scripts", "testing.clock", "testing.tap"},
    "testing.kit": {"", "embedded", "heartbeats", "testing.clock", "testing.faults", "testing.tap"},
    "testing.asserts": {"", "arguments", "testing.kit"},
    "testing": {"testing.asserts", "testing.clock", "testing.faults", "testing.kit"},
    "pytest_plugin": {"", "embedded", "testing"},
    "functions": {"errors"},
    "rq": {"", "arguments", "claims", "functions", "signals"},
}


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(module: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "squidstep_redis":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, inner = name.partition(".")
            if top == "squidstep_redis":
                found.add(inner if inner in MODULES else "")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    assert imported(module) <= MAY_IMPORT[module]


def test_imports_have_no_cycle() -> None:
    order: list[str] = []
    while rest := [module for module in MAY_IMPORT if module not in order]:
        free = [m for m in rest if m == "errors" or MAY_IMPORT[m] - {""} <= set(order)]
        assert free, f"a cycle among {rest}"
        order += free


class TestScripts:
    @pytest.fixture(params=SCRIPTS)
    def source(self, request: pytest.FixtureRequest) -> tuple[str, str, str]:
        """A script's name, its header and its code, includes and all."""
        text = (LUA / f"{request.param}.lua").read_text("utf-8")
        header = re.match(r"(--[^\n]*\n)+", text)
        assert header is not None
        code = "\n".join([text[header.end() :], *(self.library(name) for name in self.all_includes(text))])
        return request.param, header[0], re.sub(r"^\s*--.*$", "", code, flags=re.MULTILINE)

    @staticmethod
    def includes(text: str) -> list[str]:
        return re.findall(r"^\s*-- include (\w+)$", text, re.MULTILINE)

    @staticmethod
    def library(name: str) -> str:
        return (LUA / "lib" / f"{name}.lua").read_text("utf-8")

    @classmethod
    def all_includes(cls, text: str) -> list[str]:
        """Those of what is included, too."""
        found = cls.includes(text)
        inner = [cls.all_includes(cls.library(name)) for name in found]
        return list(dict.fromkeys([*found, *itertools.chain(*inner)]))

    def test_the_header_has_its_form(self, source: tuple[str, str, str]) -> None:
        name, header, _ = source
        first, blank, *rest = header.splitlines()
        assert re.fullmatch(rf"-- {name}: .+\.", first)
        assert blank == "--"
        sections = [match[1] for line in rest if (match := re.match(r"-- (KEYS|ARGV|REPLY|Writes)\b", line))]
        assert sections == ["KEYS", "ARGV", "REPLY", "Writes"]

    @pytest.mark.parametrize("kind", ["KEYS", "ARGV"])
    def test_the_header_names_what_the_code_reads(self, source: tuple[str, str, str], kind: str) -> None:
        _, header, code = source
        section = re.search(rf"-- {kind} (.*?)(?=-- [A-Z])", header, re.DOTALL)
        assert section is not None
        documented = {int(number) for number in re.findall(r"(?:^|-- +|, |\s)(\d+) [a-z_]+", section[1])}
        assert documented == set(range(1, len(documented) + 1))
        read = {int(number) for number in re.findall(rf"{kind}\[(\d+)\]", code)}
        constants = {int(number) for number in re.findall(r"local (?:FIRST|SUCCESSORS) = (\d+)", code)}
        if kind == "ARGV":
            read |= constants
            # What comes in pairs or in any number is documented by its first members.
            assert read <= documented
            assert max(documented) - max(read) <= (1 if constants else 0)
        else:
            assert read == documented

    def test_the_header_names_every_reply(self, source: tuple[str, str, str]) -> None:
        _, header, code = source
        words = set(re.findall(r'\{ "(\w+)", nonce', code)) | set(re.findall(r'with_record\("(\w+)"', code))
        words |= set(re.findall(r'and "(\w+)" or "\w+", (?:nonce|steps)', code))
        refusals = {"wrongtype", "torn", "corrupt", "newer", "tombstone"}  # of every script: lib/record.lua
        replies = re.search(r"-- REPLY (.*?)-- Writes", header, re.DOTALL)
        assert replies is not None
        assert words - refusals <= set(re.findall(r'"(\w+)"', replies[1]))

    def test_includes_exist_and_each_comes_once(self, source: tuple[str, str, str]) -> None:
        text = (LUA / f"{source[0]}.lua").read_text("utf-8")
        found = self.includes(text)
        assert found[0] == "record"
        assert len(found) == len(set(found))
        assert b"-- include" not in script(source[0]).source

    def test_every_script_has_its_call(self) -> None:
        # Of lapsed_claims and failed_steps; of wait_for_step; of runs, retry_run and purge.
        inner = {"confirm_entry", "await_step", "scan_runs", "summarize_run", "purge_run"}
        exchanges = {"batch", "runs", "retry_run", "purge"}
        shared = {"expire_claim", "wait_for_step"}  # extend_claim with no lease, await_step
        operations = {name for name, value in inspect.getmembers(Calls, inspect.isfunction) if not name.startswith("_")}
        assert set(SCRIPTS) - inner == operations - exchanges - shared

    def test_the_status_letters_are_those_of_the_model(self) -> None:
        record = (LUA / "lib" / "record.lua").read_text("utf-8")
        letters = re.search(r'^local PENDING, .* = "(\w)", "(\w)", "(\w)", "(\w)", "(\w)"$', record, re.MULTILINE)
        assert letters is not None
        assert {letter.encode() for letter in letters.groups()} == set(model.STATUS) == set(model.OUTCOME)
        assert f'local FORMAT = "{model.FORMAT.decode()}"' in record
        assert f"^{model.FORMAT.decode()}([{''.join(letters.groups())}])" in record


class TestTheTwoStores:
    OPERATIONS = [name for name in dir(Calls) if not name.startswith("_") and inspect.isfunction(getattr(Calls, name))]

    @pytest.mark.parametrize("name", OPERATIONS)
    @pytest.mark.parametrize("store", [StepRunStore, AsyncStepRunStore])
    def test_each_operation_is_a_method_of_the_same_name_signature_and_docs(self, store: type, name: str) -> None:
        method, call = getattr(store, name), getattr(Calls, name)
        assert inspect.iscoroutinefunction(method) is (store is AsyncStepRunStore)
        assert (method.__name__, method.__qualname__) == (name, f"{store.__name__}.{name}")
        assert method.__doc__ == call.__doc__
        assert inspect.signature(method).parameters == inspect.signature(call).parameters
        returned = inspect.signature(call).return_annotation
        assert returned in {
            f"{kind}[{inspect.signature(method).return_annotation}]" for kind in ("Call", "Exchange", "Plan")
        }
        typing.get_type_hints(method)

    def test_they_have_the_same_public_names(self) -> None:
        def names(store: type) -> set[str]:
            return {name for name in dir(store) if not name.startswith("_")}

        assert names(StepRunStore) == names(AsyncStepRunStore)
        assert names(StepRunStore) - names(BaseStore) == {
            *self.OPERATIONS,
            "run_step",
            "claim_step",
            "doctor",
            "send",
            "close",
        }

    @pytest.mark.parametrize("name", [*OPERATIONS, "__init__", "from_url", "queue"])
    def test_every_argument_is_documented(self, name: str) -> None:
        function = getattr(Calls, name) if name in self.OPERATIONS else getattr(BaseStore, name)
        doc = inspect.getdoc(function) or ""
        assert doc
        if name in self.OPERATIONS:
            assert "round trip" in doc.lower()
            assert "Raises:" in doc or "errors as for" in doc


def test_the_keys_are_laid_out_as_documented() -> None:
    layout = keys.Keys(b"squidstep")
    run = layout.run(b"run-1")
    bucket = f"squidstep:{{{crc32(b'run-1') % 1024:x}}}:".encode()
    assert run == (bucket + b"run-1:steps", bucket + b"run-1:done", bucket + b"claims", bucket + b"failed")
    assert len(set(layout.claims()) | set(layout.failed())) == 2 * 1024
    assert (run.claims in layout.claims(), run.failed in layout.failed()) == (True, True)
