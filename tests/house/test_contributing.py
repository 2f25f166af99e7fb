"""CONTRIBUTING.md: its list of modules is the tree, and every operation is in every place of its checklist."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from squidstep_redis import Calls

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "squidstep_redis"
GUIDE = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
OPERATIONS = [name for name, _ in inspect.getmembers(Calls, inspect.isfunction) if not name.startswith("_")]

# Operations without their own script, and the script that they send. batch sends the scripts of its calls.
OTHER_SCRIPTS = {
    "batch": None,
    "begin_steps": "begin_step",
    "complete_steps": "complete_step",
    "count_failed": "count_claims",
    "count_runs": "list_runs",
    "expire_claim": "extend_claim",
    "explain_run": "attempts",
    "explain_step": "attempts",
    "failed_steps": "list_index",
    "fork_run": "import_run",
    "lapsed_claims": "list_index",
    "live_claims": "list_index",
    "purge": "purge_run",
    "retry_run": "retry_step",
    "runs": "list_runs",
    "wait_for_step": "await_step",
}
# Operations outside the sequential specification in tests/support/model.py, and the reason.
NOT_IN_MODEL = {
    "batch": "its calls are in the model",
    "begin_steps": "begin_step of each step: test_groups.py",
    "complete_steps": "complete_step of each step: test_groups.py",
    "count_runs": "has its own tests: runs/test_run_index.py",
    "count_failed": "the size of failed_steps: runs/test_indexes.py",
    "count_claims": "the sizes of leased_claims and lapsed_claims",
    "expire_claim": "extend_claim with no lease left",
    "explain_run": "sentences: runs/test_explanations.py",
    "explain_step": "sentences: runs/test_explanations.py",
    "export_run": "has its own tests: test_transfers.py",
    "import_run": "has its own tests: test_transfers.py",
    "live_claims": "leased_claims without lapsed_claims",
    "overview": "what the listings return: runs/test_overview.py",
    "purge": "has its own tests: runs/test_listing.py",
    "retry_run": "retry_step of each failed step",
    "summarize_run": "has its own tests: contract/test_cancel.py",
    "runs": "has its own tests: runs/test_run_index.py",
    "scan_steps": "get_run in pages",
    "wait_for_step": "get_step_run after a pause: test_waiting.py",
}


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"CONTRIBUTING.md has no section {title!r}"
    return found[1]


def listed_modules() -> list[str]:
    """The modules and folders that the Architecture section describes, one list item each."""
    return re.findall(r"^ *- `([\w/]+(?:\.py|/))`: \S", section("Architecture"), re.MULTILINE)


def modules() -> Iterator[str]:
    """The modules of the package. An `__init__.py` with only a docstring does not count."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if (
            path.name != "__init__.py"
            or path.parent == PACKAGE
            or re.search(r"^(?:def|class|from)\b", path.read_text("utf-8"), re.MULTILINE)
        ):
            yield path.relative_to(PACKAGE).as_posix()


def text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def has(path: str, pattern: str) -> Callable[[str], bool]:
    """Whether a file matches a pattern, in which NAME stands for the operation."""
    return lambda name: re.search(pattern.replace("NAME", name), text(path), re.MULTILINE) is not None


def has_script(name: str) -> bool:
    script = OTHER_SCRIPTS.get(name, name)
    return script is None or (ROOT / "lua" / f"{script}.lua").is_file()


def has_function(name: str) -> bool:
    function = getattr(Calls, name)
    return function.__module__.startswith("squidstep_redis.operations.") and function.__name__ == name


# Each item of the checklist: the place as CONTRIBUTING.md names it, and whether it has the operation.
CHECKLIST: dict[str, Callable[[str], bool]] = {
    "lua/<name>.lua": has_script,
    "operations/<subject>.py": has_function,
    "operations/calls.py": has("squidstep_redis/operations/calls.py", r"^    NAME = \w+\.NAME$"),
    "store.py": has("squidstep_redis/store.py", r"^    NAME = _\w+\(Calls\.NAME\)$"),
    "aio.py": has("squidstep_redis/aio.py", r"^    NAME = _\w+\(Calls\.NAME\)$"),
    "tests/support/model.py": lambda name: (
        name in NOT_IN_MODEL or has("tests/support/model.py", r"^    def NAME\(")(name)
    ),
    "tests/support/operations.py": has("tests/support/operations.py", r"\bNAME\b"),
    "tests/typed/typed_api.py": has("tests/typed/typed_api.py", r"\bstore\.NAME\("),
    "tests/guide/calls.md": has("tests/guide/calls.md", r"`NAME\(|store\.NAME\("),
    "CHANGELOG.md": has("CHANGELOG.md", r"`NAME`"),
}


@pytest.mark.slow
def test_the_architecture_lists_every_module_once() -> None:
    entries = listed_modules()
    assert len(entries) == len(set(entries))
    covered = {
        entry: [name for name in modules() if name == entry or (entry[-1] == "/" and name.startswith(entry))]
        for entry in entries
    }
    assert [entry for entry, names in covered.items() if not names] == [], "described, but not in the tree"
    assert sorted(name for names in covered.values() for name in names) == list(modules()), "in the tree, not described"


def test_the_checklist_names_every_checked_place() -> None:
    items = re.findall(r"^\d+\. `([^`]+)`: ", section("How to add an operation"), re.MULTILINE)
    assert items == list(CHECKLIST)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_in_every_place_of_the_checklist(name: str) -> None:
    missing = [place for place, has_it in CHECKLIST.items() if not has_it(name)]
    assert missing == [], f"{name} is missing in {', '.join(missing)}"


def test_the_exceptions_are_operations_that_need_one() -> None:
    assert set(OTHER_SCRIPTS) | set(NOT_IN_MODEL) <= set(OPERATIONS)
    assert [name for name in OTHER_SCRIPTS if (ROOT / "lua" / f"{name}.lua").exists()] == []
    assert [name for name in NOT_IN_MODEL if has("tests/support/model.py", r"^    def NAME\(")(name)] == []


def test_paths_in_the_guide_exist() -> None:
    tables = section("To change X, edit here")
    paths = re.findall(r"`((?:squidstep_redis|lua|tests|\.ci|\.github)/[\w./-]+)`", tables)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_ci_is_the_one_check_command() -> None:
    assert "`.ci/run --quick`" in GUIDE
    assert "entry: .ci/run --quick" in text(".pre-commit-config.yaml")
