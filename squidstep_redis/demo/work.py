"""What every demo does, and how it is checked: three steps on each of some real files, and a sequential computation.

The check does not rest on the store's word alone: a `Tally` counts what the workers told of each effect, apart from
the store.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Final

from squidstep_redis import SquidstepError, StepRunStore

SEED: Final = 20  # which deliveries come twice, and when, is the same each time
MAX_BYTES: Final = 4 * 1024 * 1024  # of a file: no step may come near its lease
SKIPPED: Final = ("__pycache__", "site-packages")

Payload = dict[str, Any]
Key = tuple[str, str]


# The work: for each file three steps, in this order. Each is given what is known so far.


def _digest(data: bytes) -> Payload:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _compress(data: bytes) -> Payload:
    return {"compressed": len(zlib.compress(data))}


def _count(data: bytes) -> Payload:
    return {"lines": data.count(b"\n"), "words": len(data.split())}


EFFECTS: Final[dict[str, Callable[[bytes], Payload]]] = {"digest": _digest, "compress": _compress, "count": _count}


def execute(step: str, input: Payload) -> Payload:
    """Does a step's work."""
    return EFFECTS[step](Path(input["path"]).read_bytes())


def sequential(path: Path) -> list[tuple[str, Payload, Payload]]:
    """What the store must hold in the end: step, input and output of each step of a file's run."""
    input: Payload = {"path": str(path)}
    steps: list[tuple[str, Payload, Payload]] = []
    for step in EFFECTS:
        steps.append((step, input, execute(step, input)))
        input = {**input, **steps[-1][2]}
    return steps


def find_files(root: Path, limit: int, suffix: str = "") -> dict[str, Path]:
    """The first files under a directory, or the one file, by run id: the path from there, in sorted order."""
    root = root.absolute()
    found = [root] if root.is_file() else _walk(root, suffix)
    named = ((path.relative_to(root.parent if root.is_file() else root).as_posix(), path) for path in found)
    return dict(islice(((name, path) for name, path in named if _is_usable(name, path)), limit))


def _walk(root: Path, suffix: str) -> Iterator[Path]:
    for directory, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if name.endswith(suffix))


def _is_usable(run_id: str, path: Path) -> bool:
    with suppress(OSError, UnicodeEncodeError):  # a run id is text, and file names need not be
        is_plain = path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        return is_plain and path.stat().st_size <= MAX_BYTES and len(run_id.encode()) <= 512
    return False


# The check


@dataclass
class Tally:
    """What the workers told: which effects they began and ended, and whatever else there is to count."""

    begun: Counter[Key] = field(default_factory=Counter[Key])
    ended: Counter[Key] = field(default_factory=Counter[Key])
    counts: Counter[str] = field(default_factory=Counter[str])


def _as_it_is(payload: Payload) -> Payload:
    return payload


def check_runs(
    store: StepRunStore,
    files: dict[str, Path],
    tally: Tally,
    killed: Collection[Key],
    *,
    as_input: Callable[[Payload], Payload] = _as_it_is,
    as_output: Callable[[Payload], Payload] = _as_it_is,
) -> Iterator[str]:
    """Holds the store, and what the workers told, against a plain sequential computation; yields what is wrong.

    Args:
        store: keeps the runs.
        files: by run id.
        tally: of all effects.
        killed: the steps inside which a worker was killed. They alone may have begun twice.
        as_input: how an input is kept.
        as_output: likewise.
    """
    for run_id, path in files.items():
        try:
            expected = [(step, as_input(given), as_output(output)) for step, given, output in sequential(path)]
            stored = [(step_run.step, step_run.input, step_run.output) for step_run in store.get_run(run_id)]
            order, outputs = store.completed_steps(run_id), store.completed_outputs(run_id)
        except (OSError, SquidstepError) as error:
            yield f"{run_id}: {error}"
            continue
        for is_, should_be in zip_longest(stored, expected):
            if is_ != should_be:
                yield f"{run_id}: stored is {is_}, a sequential computation gives {should_be}"
        if (order, outputs) != (list(EFFECTS), [output for _, _, output in expected]):
            yield f"{run_id}: completed, in this order, are {order} with {outputs}"
        for step in EFFECTS:
            seen = (tally.begun[run_id, step], tally.ended[run_id, step])
            if seen != (2 if (run_id, step) in killed else 1, 1):
                yield f"{run_id}: {step} was begun {seen[0]} times and ended {seen[1]} times"
