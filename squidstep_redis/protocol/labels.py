"""Labels of runs: short texts for finding runs, such as a tenant. lua/README.md shows how they are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.protocol.arguments import without_controls

MAX_LABELS: Final = 8
MAX_VALUE_BYTES: Final = 64

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


def labels_data(value: object) -> bytes:
    """Returns labels as they are stored: a line `name=value` for each, sorted; empty for None.

    Raises:
        InvalidArgumentError: it is not a mapping of at most 8 labels, a name is not 1 to 32 ASCII letters, digits,
            underscores, dots and hyphens with a letter or an underscore first, or a value is not a str of 1 to 64 bytes
            of UTF-8 without control characters.
    """
    if value is None:
        return b""
    items = check_label_names(value)
    return b"\n".join(sorted(b"%b=%b" % (name.encode(), _value(name, items[name])) for name in items))


def check_label_names(value: object) -> dict[str, Any]:
    """Returns labels after checking their names and number, but not their values."""
    if not isinstance(value, Mapping):
        raise InvalidArgumentError("labels", f"must be a dict of str by name, not {described(value)}")
    items = cast("Mapping[object, Any]", value)
    if len(items) > MAX_LABELS:
        raise InvalidArgumentError("labels", f"must be at most {MAX_LABELS}, not {len(items)}")
    return {label_name(name): items[name] for name in items}


def label_name(value: object) -> str:
    """Returns the name of a label."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        problem = (
            "a name must be 1 to 32 ASCII letters, digits, underscores, dots and hyphens, and begin with a letter or "
            f"an underscore, not {described(value)}"
        )
        raise InvalidArgumentError("labels", problem)
    return value


def _value(name: object, value: object) -> bytes:
    return without_controls(f"labels[{name!r}]", value, MAX_VALUE_BYTES)


def parse_labels(data: bytes) -> dict[str, str]:
    """Returns stored labels. Bytes that `labels_data` would not return are escaped, so that they can be shown."""
    pairs = (line.decode(errors="backslashreplace").partition("=") for line in data.split(b"\n"))
    return {name: value for name, _, value in pairs} if data else {}
