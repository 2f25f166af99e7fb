"""The house rules: imports point one way, names are one."""

from __future__ import annotations

import ast
import inspect
import typing
from binascii import crc32
from pathlib import Path

import pytest

from squidstep_redis import AsyncStepRunStore, Calls, StepRunStore, model
from squidstep_redis.protocol import keys
from squidstep_redis.settings import BaseStore

PACKAGE = Path(inspect.getfile(model)).parent

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
