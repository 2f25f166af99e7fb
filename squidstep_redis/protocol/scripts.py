"""Builds the Lua scripts from their source files.

`lua/NAME.lua` is a script, and `lua/lib/NAME.lua` has code that scripts share. In a checkout, `lua` is next to the
package; in a wheel, it is inside. Python may import the package from a zip. A script is built in five steps, once per
process:

1. The general path: the code after the line `-- general path` becomes a function. In every call, the server clears room
   for all local variables of a script. With the general path's variables in a function, a call that takes the common
   case before it does not pay for them.
2. Includes: the line `-- include NAME` becomes the text of `lib/NAME.lua`; a repeated include is dropped.
3. Macros: the line `-- define NAME text` or `-- define NAME(parameter, …) text` defines a macro for the whole script,
   including the lines above it. Lines that begin with `--   ` continue the text. Lines of code use it as `@NAME` or
   `@NAME(argument, …)`. A macro may use other macros. An argument is Lua text without parentheses, except in a literal
   or in a macro.
4. Comments: whole-line comments, blank lines and indentation are dropped, because batches send the source.
5. Literals: `"a" .. "b"` becomes `"ab"`, so that a pattern composed of macros costs nothing on the server. This is a
   textual replacement: no literal in the scripts may contain ` .. `.
"""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_PACKAGE: Final = Path(__file__).parent.parent
_GENERAL_PATH: Final = re.compile(r"^-- general path\n(.*)", re.MULTILINE | re.DOTALL)
_INCLUDE: Final = re.compile(r"^\s*-- include (\w+)$", re.MULTILINE)
_DEFINE: Final = re.compile(r"^-- define (\w+)(?:\(([\w, ]*)\))? (.*(?:\n--   .*)*)$", re.MULTILINE)
_CONTINUATION: Final = re.compile(r"\n--  ")
_USE: Final = re.compile(r'@(\w++)(?:\(((?:"[^"\n]*"|[^"()@])*)\)|(?!\())')  # innermost: no macro in its arguments
_ARGUMENT: Final = re.compile(r'(?:"[^"\n]*"|[^",])+')
_NO_TRANSITION: Final = re.compile(r"^-- Writes (nothing|only hints)\b", re.MULTILINE)
_NOT_CODE: Final = re.compile(r"^\s*(--.*)?\n|^ +", re.MULTILINE)


class Script(NamedTuple):
    """A script as the server receives it.

    Attributes:
        name: the stem of its file.
        source: what EVAL sends.
        sha: what EVALSHA sends.
        is_transition: whether it writes more than hints, according to its header.
    """

    name: str
    source: bytes
    sha: bytes
    is_transition: bool


class Macro(NamedTuple):
    """A macro: its parameters, or None if it takes no argument list, and its text."""

    parameters: tuple[str, ...] | None
    text: str


def directory() -> Path | Traversable:
    """Returns the directory of the scripts: inside an installed package or its zip, or next to it in a checkout."""
    installed = _PACKAGE / "lua"
    if installed.is_dir():
        return installed
    if _PACKAGE.is_dir():
        return _PACKAGE.parent / "lua"
    from importlib.resources import files  # noqa: PLC0415 -- slow to import, and needed for a zip only

    # Opened for each script and closed with this object: a forked child must not share the position in an open zip.
    return files("squidstep_redis") / "lua"


def names() -> list[str]:
    """Returns the names of all scripts."""
    files = [each.name for each in directory().iterdir()]
    return sorted(name.removesuffix(".lua") for name in files if name.endswith(".lua"))


@cache
def script(name: str) -> Script:
    """Builds a script, once per process.

    Args:
        name: the stem of its file.

    Raises:
        ValueError: an include or a macro is unknown, or a macro is defined twice or misused.
    """
    lua = directory()
    text = (lua / f"{name}.lua").read_text(encoding="utf-8")
    wrapped = _GENERAL_PATH.sub(r"local function general_path()\n\1end\nreturn general_path()\n", text)
    whole = _included(wrapped, name, lua / "lib", set())
    source = _expanded(_NOT_CODE.sub("", whole), macros(whole, name), name).replace('" .. "', "").encode()
    sha = sha1(source, usedforsecurity=False).hexdigest().encode()
    return Script(name, source, sha, is_transition=not _NO_TRANSITION.search(text))


def macros(text: str, name: str) -> dict[str, Macro]:
    """Collects the macros that a text defines.

    Args:
        text: Lua, with its comments.
        name: name of the script, for error messages.
    """
    found: dict[str, Macro] = {}
    for macro, parameters, body in _DEFINE.findall(text):
        if macro in found:
            raise ValueError(f"{name}.lua: macro {macro} is defined twice; rename one of the two")
        names = tuple(parameters.split(", ")) if parameters else None
        found[macro] = Macro(names, _CONTINUATION.sub("", body))
    return found


def _included(text: str, name: str, lib: Path | Traversable, seen: set[str]) -> str:
    def replaced(match: re.Match[str]) -> str:
        included = match[1]
        if included in seen:
            return ""
        seen.add(included)
        path = lib / f"{included}.lua"
        if not path.is_file():
            raise ValueError(f"{name}.lua: include {included} is unknown; there is no lib/{included}.lua")
        return _included(path.read_text(encoding="utf-8"), name, lib, seen)

    return _INCLUDE.sub(replaced, text)


def _expanded(code: str, known: dict[str, Macro], name: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        used = match[1]
        if used not in known:
            raise ValueError(f"{name}.lua: macro {used} is undefined, or its text uses itself")
        parameters, text = known[used]
        arguments = None if match[2] is None else [each.strip() for each in _ARGUMENT.findall(match[2])]
        if (parameters and len(parameters)) != (arguments and len(arguments)):
            expected = f"the arguments ({', '.join(parameters)})" if parameters else "no arguments"
            raise ValueError(f"{name}.lua: macro {used} takes {expected}, not {match[0]}")
        if parameters and arguments:
            values = dict(zip(parameters, arguments, strict=True))
            text = re.sub(rf"\b({'|'.join(parameters)})\b", lambda parameter: values[parameter[1]], text)
        return _expanded(text, {other: known[other] for other in known if other != used}, name)

    while "@" in code:  # each pass expands the innermost macros, then those that have them as arguments
        code, count = _USE.subn(replaced, code)
        if not count:
            malformed = code[code.index("@") :].partition("\n")[0]
            raise ValueError(f"{name}.lua: the arguments of a macro are malformed: {malformed}")
    return code
