"""Makes text from outside safe for terminals and logs: what is escaped, and what an owner must not contain."""

from __future__ import annotations

import json
import re
from typing import Any, Final

# Characters with which text controls a terminal (C0, DEL, C1), breaks a line, or reorders what a person reads.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def has_controls(text: str) -> bool:
    """Returns whether text has control characters, line breaks or bidirectional controls."""
    return _CONTROL.search(text) is not None


def without_controls(text: str) -> str:
    """Returns text in which a question mark replaces each character that `has_controls` finds."""
    return _CONTROL.sub("?", text)


def escaped(text: str) -> str:
    r"""Returns untrusted text as one line, in which every character that is not printable is escaped, such as `\x1b`.

    That includes all that `has_controls` finds, and invisible characters.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def json_line(value: Any) -> str:
    r"""Returns a value as one line of JSON that reads back equal; what is not printable is escaped as `\uXXXX`."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
