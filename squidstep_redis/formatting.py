"""Text that the command line and the web page show: times, leases, errors, explanations. All of it is one safe line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final, cast
from uuid import UUID

from squidstep_redis import Action, Calls, StepExplanation, StepRun, StepStatus, UndecodablePayloadError
from squidstep_redis.durations import format_duration
from squidstep_redis.escaping import escaped

_HEADLINES: Final = {
    "completed": "completed",
    "leased": "running: a worker holds it",
    "unleased": "running: a worker holds it, without a lease",
    "lapsed": "running, but the lease of its worker has expired",
    "pending": "pending: waits for a delivery",
    "failed": "failed: waits for the next delivery",
    "delayed": "failed: can be retried later",
    "exhausted": "failed: no attempt is left",
    "final": "failed permanently",
}
# The command of each operation that an explanation names; RUN and STEP stand for the step's.
_COMMANDS: Final[Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]]] = {  # name, arguments, options
    "retry_step": ("retry", ("RUN",), ("--step", "STEP")),
    "release_step": ("release", ("RUN", "STEP"), ()),
    "resume_run": ("resume", ("RUN",), ()),
    "complete_step": ("complete", ("RUN", "STEP"), ("--output", '{"key": "value"}')),
}


def format_age(moment: datetime | None, now: datetime | None = None) -> str:
    """Returns how long ago a moment was.

    Args:
        moment: The moment; None: the text is empty.
        now: The current time; None: this machine's clock.
    """
    return "" if moment is None else f"{format_duration(((now or datetime.now(UTC)) - moment).total_seconds())} ago"


def format_lease(step_run: StepRun) -> str:
    """Returns the remaining time of a running step's lease, or when a failed step can be claimed again."""
    if step_run.final:
        return "failed permanently"
    if step_run.retry_at is not None:
        left = (step_run.retry_at - datetime.now(UTC)).total_seconds()
        return f"can be retried in {format_duration(left)}" if left > 0 else ""
    if step_run.status is not StepStatus.RUNNING:
        return ""
    if step_run.lease_ends_at is None:
        return "no lease"
    left = (step_run.lease_ends_at - datetime.now(UTC)).total_seconds()
    return f"lease ends in {format_duration(left)}" if left > 0 else f"lease expired {format_duration(-left)} ago"


def format_time(moment: datetime) -> str:
    """Returns a moment such as `2026-11-27 08:20:01`, in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def cut(text: str, length: int) -> str:
    """Returns text, cut to `length` characters with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def format_labels(labels: Mapping[str, str]) -> str:
    """Formats the labels of a run as one line."""
    return escaped(" ".join(f"{name}={value}" for name, value in labels.items()))


def error_line(error: Mapping[str, Any]) -> str:
    """Returns an error's type and message, or all of it if it has no type or message."""
    named = "type" in error and "message" in error
    return escaped(f"{error['type']}: {error['message']}") if named else payload_line(error)


def last_error_line(step_run: StepRun) -> str:
    """Returns the last error of a step run, or why it cannot be decoded; empty without an error."""
    try:
        error = step_run.last_error
    except UndecodablePayloadError as problem:
        return f"({escaped(str(problem))})"
    return "" if error is None else error_line(error)


def error_type(step_run: StepRun) -> str:
    """Returns the type of a step run's last error."""
    try:
        return escaped(str((step_run.last_error or {}).get("type", ""))) or "(without a type)"
    except UndecodablePayloadError:
        return "(cannot be decoded)"


def traceback_lines(step_run: StepRun) -> list[str]:
    """Returns the traceback that `fail_step` stored for an exception."""
    with suppress(UndecodablePayloadError):
        traceback = (step_run.last_error or {}).get("traceback")
        if isinstance(traceback, str):
            return [escaped(line) for line in traceback.splitlines()]
    return []


def format_headline(explained: StepExplanation) -> str:
    """Returns the state of an explained step in a few words."""
    return _HEADLINES.get(explained.reason, f"{explained.status}: does not begin, because the run is cancelled")


def format_command(explained: StepExplanation, action: Action) -> str | None:
    """Returns the command line of an action, for bash; None if there is none."""
    names = {"RUN": explained.run_id, "STEP": explained.step}
    if action.operation is None or any("\0" in name for name in names.values()):  # no argument can contain a NUL
        return None
    command, *parts = _COMMANDS[action.operation]
    arguments, options = ([names.get(word, word) for word in words] for words in parts)
    words = [*arguments, *options]
    if any(argument.startswith("-") for argument in arguments):
        words = [*options, "--", *arguments]
    return " ".join(["squidstep", command, *map(_quoted, words)])


def _quoted(word: str) -> str:
    """Quotes a word for bash; what is not printable is escaped, byte by byte."""
    if word.isprintable():
        return shlex.quote(word)
    characters = (f"\\{char}" if char in "\\'" else char if char.isprintable() else _bytes(char) for char in word)
    return f"$'{''.join(characters)}'"


def _bytes(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())


def payload_line(value: Any) -> str:
    """Returns a payload as one line that resembles JSON."""
    return escaped(json.dumps(_readable(value), ensure_ascii=False))


def readable_scalar(value: Any) -> Any:
    """Returns a value that is not a collection as JSON; a value that JSON cannot represent becomes text."""
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID, date, time, timedelta)):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _readable(value: Any) -> Any:
    """Replaces the values that JSON cannot represent."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key if isinstance(key, str) else str(key): _readable(item) for key, item in items}
    if isinstance(value, list):
        return [_readable(item) for item in cast("list[Any]", value)]
    return readable_scalar(value)


class _Opaque:
    """A codec that decodes every payload to an error saying that it cannot be decoded."""

    def encode(self, payload: dict[str, Any]) -> bytes:
        raise TypeError(f"it only reads: {payload}")

    def decode(self, data: bytes) -> dict[str, Any]:
        return {"type": "undecodable", "message": f"the store's codec cannot decode this error of {len(data):,} bytes"}


def opaque_calls(prefix: str) -> Calls:
    """Returns calls that decode no payload: an error that the store's codec cannot decode does not hide attempts.

    Args:
        prefix: The prefix of the store's keys.
    """
    return Calls(prefix, _Opaque(), 1, None)
