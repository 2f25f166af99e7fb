"""The layers of the package, its public names, and the two stores: one rule each."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from binascii import crc32
from functools import cache
from pathlib import Path

import pytest

import squidstep_redis
from squidstep_redis import AsyncStepRunStore, Calls, StepRunStore, model
from squidstep_redis.facade import BaseStore
from squidstep_redis.protocol.keys import Keys

PACKAGE = Path(inspect.getfile(model)).parent

# The layers, lowest first. A module imports from its own layer and from those below it, and from no other.
LAYERS = (
    (
        "docstrings",
        "durations",
        "errors",
        "escaping",
        "explanations",
        "ids",
        "model",
        "server_errors",
        "signals",
        "steady",
        "summaries",
    ),
    ("protocol",),
    ("operations",),
    ("transport",),
    ("claims", "doctor"),
    ("functions",),
    ("settings", "facade", "store", "aio"),
)
# What is built on the library imports its public names. Further imports are listed here.
BESIDE_PUBLIC_NAMES = {
    "asgi": {"asgi", "functions.checks"},
    "celery": {
        "celery",
        "claims.failures",
        "claims.request",
        "functions",
        "protocol.arguments",
        "signals",
        "task_queue_runs",
        "task_queues",
    },
    "cli": {
        "cli",
        "durations",
        "embedded",
        "escaping",
        "formatting",
        "operations.documents",
        "operations.payload_json",
        "protocol.labels",
        "timelines",
        "web",
    },
    "codecs": set[str](),
    "demo": {"demo", "cli.output", "embedded", "rq"},
    "embedded": {"embedded_supervisor"},
    "embedded_supervisor": set[str](),
    "formatting": {"durations", "escaping"},
    "metrics": {"steady", "transport.blocking", "transport.client", "transport.helper"},
    "pytest_plugin": {"embedded", "testing"},
    "rq": {
        "rq",
        "claims.request",
        "escaping",
        "functions",
        "protocol.arguments",
        "signals",
        "task_queue_runs",
        "task_queues",
    },
    "task_queue_runs": {"claims.request", "functions", "protocol.arguments"},
    "task_queues": {"claims.request", "escaping", "functions", "protocol.arguments", "signals", "transport.blocking"},
    "testing": {"testing", "embedded", "protocol.arguments", "protocol.scripts"},
    "timelines": {"durations", "escaping", "formatting"},
    "web": {"web", "durations", "escaping", "formatting", "operations.payload_json", "timelines"},
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES.pop("__init__")


@cache
def imported(module: str) -> set[str]:
    """The modules of the package that a module imports; "" stands for the public names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        inner = {name.partition(".")[2] for name in names if name.partition(".")[0] == "squidstep_redis"}
        found |= inner & MODULES.keys() or ({""} if inner else set())
    return found


def layer_of(module: str) -> int | None:
    top = module.partition(".")[0]
    return next((level for level, names in enumerate(LAYERS) if top in names), None)


@pytest.mark.slow
def test_imports_point_down_the_layers() -> None:
    for module in MODULES:
        level = layer_of(module)
        for name in imported(module):
            if level is None:
                allowed = BESIDE_PUBLIC_NAMES[module.partition(".")[0]]
                assert not name or {name, name.partition(".")[0]} & allowed, f"{module} imports {name}, no public name"
            elif module not in ("errors", "server_errors"):  # whose imports are for type checkers
                below = layer_of(name)
                assert below is not None, f"{module} imports {name or 'the public names'}, an integration's right"
                assert below <= level, f"{module} imports {name}, of a higher layer"


@pytest.mark.slow
def test_modules_import_each_other_without_a_cycle() -> None:
    edges = {module: imported(module) - {module} for module in MODULES if module not in ("errors", "server_errors")}
    while free := [module for module, names in edges.items() if not names & edges.keys()]:
        for module in free:
            del edges[module]
    assert not edges, f"a cycle among {sorted(edges)}"


def test_stores_import_functions_when_a_function_is_a_step() -> None:
    for module in ("facade", "store", "aio"):
        tree = ast.parse(MODULES[module].read_text("utf-8"))
        at_once = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert at_once
        assert not [name for name in at_once if name.startswith("squidstep_redis.functions")]


class TestPublicNames:
    def test_type_checkers_see_the_names_that_are_loaded(self) -> None:
        stub = PACKAGE.joinpath("__init__.pyi").read_text("utf-8")
        declared = re.findall(r"^(?:from \S+ import |    )(\w+) as \1,?$", stub, re.MULTILINE)
        assert sorted(declared) == squidstep_redis.__all__

    def test_each_public_name_can_be_imported(self) -> None:
        for name in squidstep_redis.__all__:
            assert getattr(squidstep_redis, name) is not None
            assert name in dir(squidstep_redis)

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no_such_name"):
            squidstep_redis.no_such_name  # noqa: B018 -- the access itself is tested


class TestTheTwoStores:
    OPERATIONS = [name for name in dir(Calls) if not name.startswith("_") and inspect.isfunction(getattr(Calls, name))]
    WRITTEN_OUT = ("send", "run_step", "claim_step", "step", "run", "doctor", "close")

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_each_operation_is_a_documented_method_of_both(self, name: str) -> None:
        for store in (StepRunStore, AsyncStepRunStore):
            self.check_method(store, name)

    def check_method(self, store: type, name: str) -> None:
        method, operation = getattr(store, name), getattr(Calls, name)
        assert inspect.iscoroutinefunction(method) is (store is AsyncStepRunStore)
        assert (method.__name__, method.__qualname__) == (name, f"{store.__name__}.{name}")
        assert method.__doc__ == operation.__doc__
        assert list(inspect.signature(method).parameters.values())[1:] == parameters_of(operation)
        result = inspect.signature(operation).return_annotation
        assert result in {f"{kind}[{inspect.signature(method).return_annotation}]" for kind in ("Call", "Workflow")}
        typing.get_type_hints(method)

    def test_both_have_the_same_public_names(self) -> None:
        def names(store: type) -> set[str]:
            return {name for name in dir(store) if not name.startswith("_")}

        assert names(StepRunStore) == names(AsyncStepRunStore)
        assert names(StepRunStore) - names(BaseStore) == {*self.OPERATIONS, *self.WRITTEN_OUT}

    @pytest.mark.parametrize("name", [*OPERATIONS, *WRITTEN_OUT, "from_url", "queue", "on_event"])
    def test_every_parameter_is_described_in_place(self, name: str) -> None:
        for store in (StepRunStore, AsyncStepRunStore):
            self.check_documentation(store, name)

    def check_documentation(self, store: type, name: str) -> None:
        doc = inspect.getdoc(getattr(store, name)) or ""
        for parameter in parameters_of(getattr(store, name)):
            stars = {parameter.VAR_KEYWORD: r"\*\*"}.get(parameter.kind, "")
            assert re.search(rf"^    {stars}{parameter.name}: \S", doc, re.MULTILINE), (
                f"{name} leaves out {parameter.name}"
            )
        if name in self.OPERATIONS:
            assert "round trip" in doc
            assert "Raises:" in doc
        assert not re.search(r"\b(as for|likewise|see there)\b", doc, re.IGNORECASE)


def parameters_of(function: typing.Any) -> list[inspect.Parameter]:
    found = list(inspect.signature(function).parameters.values())
    return found if inspect.ismethod(function) else found[1:]


def test_keys_are_laid_out_as_documented() -> None:
    layout = Keys(b"squidstep")
    run = layout.run("run-1").keys
    bucket = f"squidstep:{{{crc32(b'run-1') % 1024:x}}}:".encode()
    assert run == (bucket + b"run-1:steps", bucket + b"run-1:done", bucket + b"claims", bucket + b"failed")
    assert len(set(layout.claims()) | set(layout.failed())) == 2 * 1024
    assert (run.claims in layout.claims(), run.failed in layout.failed()) == (True, True)
