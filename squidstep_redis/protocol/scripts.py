"""The Lua scripts, as they are sent: found, put together with what they include, and named by their digest."""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Final, NamedTuple

_PACKAGE: Final = Path(__file__).parent.parent
_INCLUDE: Final = re.compile(r"^\s*-- include (\w+)$", re.MULTILINE)
_NO_TRANSITION: Final = re.compile(r"^-- Writes (nothing|hints alone)\b", re.MULTILINE)
_NOT_CODE: Final = re.compile(r"^\s*(--.*)?\n", re.MULTILINE)


class Script(NamedTuple):
    """One script: `name` is its file's stem, `source` what EVAL takes, `sha` what EVALSHA takes.

    `is_transition` is what its header says: whether it writes more than hints.
    """

    name: str
    source: bytes
    sha: bytes
    is_transition: bool


def directory() -> Path:
    """Where the scripts lie: inside the installed package, or beside it in a checkout."""
    installed = _PACKAGE / "lua"
    return installed if installed.is_dir() else _PACKAGE.parent / "lua"


@cache
def script(name: str) -> Script:
    """Reads a script, once. Whole-line comments are left out of what is sent: it travels with batches."""
    lua = directory()
    there: set[str] = set()

    def included(match: re.Match[str]) -> str:
        if match[1] in there:
            return ""
        there.add(match[1])
        return _INCLUDE.sub(included, (lua / "lib" / f"{match[1]}.lua").read_text("utf-8"))

    text = (lua / f"{name}.lua").read_text("utf-8")
    source = _NOT_CODE.sub("", _INCLUDE.sub(included, text)).encode()
    sha = sha1(source, usedforsecurity=False).hexdigest().encode()
    return Script(name, source, sha, is_transition=not _NO_TRANSITION.search(text))
