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

from squidstep_redis import AsyncStepRunStore, Calls, StepRunStore, model
from squidstep_redis.protocol import keys
from squidstep_redis.protocol.scripts import directory, script
from squidstep_redis.settings import BaseStore

PACKAGE = Path(inspect.getfile(model)).parent
LUA = directory()
SCRIPTS = sorted(path.stem for path in LUA.glob("*.lua"))

# The layers, lowest first. A module may import from its own layer and from those below, and from no other.
LAYERS = (
    ("errors", "model", "signals"),
    ("protocol",),
    ("operations",),
    ("transport",),
    ("claims", "doctor"),
    ("settings", "store", "aio"),
)
# What is built on the library imports its public names; beside them, only what is listed here.
BESIDE_PUBLIC_NAMES = {
    "cli": {"cli", "embedded", "operations.documents"},
    "demo": {"demo", "embedded", "rq"},
    "embedded": set[str](),
    "metrics": set[str](),
    "pytest_plugin": {"embedded", "testing"},
    "rq": {"rq", "claims.rules", "protocol.arguments", "signals"},
    "testing": {"testing", "claims.heartbeat", "embedded", "protocol.arguments", "protocol.scripts"},
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


def layer_of(module: str) -> int | None:
    top = module.partition(".")[0]
    return next((level for level, names in enumerate(LAYERS) if top in names), None)


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_point_down_the_layers(module: str) -> None:
    """Each of six layers imports from those below; the integrations use public names; nothing imports them."""
    level = layer_of(module)
    allowed = BESIDE_PUBLIC_NAMES[module.partition(".")[0]] if level is None else set[str]()
    for name in imported(module):
        if level is not None:
            below = layer_of(name)
            for_type_checkers = module == "errors"
            assert below is not None, f"{module} imports the integration {name}"
            assert below <= level or for_type_checkers, f"{module} imports {name}, of a higher layer"
        elif name:
            assert name in allowed or name.partition(".")[0] in allowed, f"{module} imports {name}, no public name"


def test_imports_have_no_cycle_between_modules() -> None:
    edges = {module: imported(module) - {module} for module in MODULES if module not in ("", "errors")}
    while free := [module for module, names in edges.items() if not names & edges.keys()]:
        for module in free:
            del edges[module]
    assert not edges, f"a cycle among {sorted(edges)}"


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
