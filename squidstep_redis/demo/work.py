"""The work of both demos: three steps per file, and a sequential computation of the same steps."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final

MAX_BYTES: Final = 4 * 1024 * 1024  # per file, so that no step runs for nearly as long as its lease
IGNORED_FOLDERS: Final = ("__pycache__", "site-packages")

Payload = dict[str, Any]


Step = tuple[str, Payload, Payload]  # with its input and output

STEPS: Final[dict[str, Callable[[bytes], Payload]]] = {
    "digest": lambda data: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)},
    "compress": lambda data: {"compressed": len(zlib.compress(data))},
    "count": lambda data: {"lines": data.count(b"\n"), "words": len(data.split())},
}


def execute(step: str, input: Payload) -> Payload:
    """Executes one step. `input` has the path of the file, and the outputs of the previous steps."""
    return STEPS[step](Path(input["path"]).read_bytes())


def sequential(path: Path) -> list[Step]:
    """Computes all steps of a file, one after the other, without a store."""
    known: Payload = {"path": str(path)}
    steps: list[Step] = []
    for name in STEPS:
        output = execute(name, known)
        steps.append((name, known, output))
        known = {**known, **output}
    return steps


def find_files(root: Path, limit: int, suffix: str = "") -> dict[str, Path]:
    """Finds the first files under a directory in sorted order.

    Args:
        root: The directory. If it is a file, that file alone is found.
        limit: The maximum number of files.
        suffix: The end of the files' names.

    Returns:
        The files by run id, which is the path relative to the directory.
    """
    root = root.absolute()
    folder, paths = (root.parent, iter([root])) if root.is_file() else (root, _walk(root, suffix))
    return {path.relative_to(folder).as_posix(): path for path in islice(filter(_is_usable, paths), limit)}


def _walk(root: Path, suffix: str) -> Iterator[Path]:
    for directory, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in IGNORED_FOLDERS and not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if name.endswith(suffix))


def _is_usable(path: Path) -> bool:
    with suppress(OSError, UnicodeEncodeError):  # run ids are text, but file names may be any bytes
        is_plain = path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        return is_plain and path.stat().st_size <= MAX_BYTES and len(str(path).encode()) <= 512
    return False
