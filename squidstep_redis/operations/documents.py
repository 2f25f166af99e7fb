"""A run as a JSON document, and back: what `export_run` returns and `import_run` accepts. Pure.

It contains decoded payloads, not the codec's bytes: people can read them, and a store with another codec, such as one
that compresses or encrypts, can import them. A value that JSON cannot represent is written as an object with one key
that begins with a dollar sign.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, cast

from squidstep_redis.errors import CorruptRunError, InvalidArgumentError, UndecodablePayloadError, described
from squidstep_redis.escaping import escaped
from squidstep_redis.model import StateLine, moment
from squidstep_redis.operations.payload_json import bytes_from_text, from_json, to_json
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.call import corrupt
from squidstep_redis.protocol.codec import PayloadField, Payloads
from squidstep_redis.protocol.labels import labels_data, parse_labels
from squidstep_redis.protocol.records import (
    IMPORTED_CHECKPOINT,
    LEASE_EXPIRED,
    lease_expired_error,
    progress_payload,
    step_name,
)

VERSION: Final = 1

Document = dict[str, Any]

_STATES: Final = {
    b"p": "pending",
    b"r": "running",
    b"c": "completed",
    b"f": "failed",
    b"x": "lease_expired",
    b"n": "failed_permanently",
}
_LETTERS: Final = {state: letter for letter, state in _STATES.items()}
_TOKEN: Final = re.compile(r"[!-~]{0,64}")
_HISTORY: Final = re.compile(rb"a(\d{1,13}):(.+)", re.DOTALL)
_MILLISECOND: Final = timedelta(milliseconds=1)
_MAX_NUMBER: Final = 10**9


class Imported(NamedTuple):
    """What is sent to create a run: the records of a document, or those of a fork.

    Attributes:
        run_id: the run.
        ttl_ms: expiry of the run; empty: none.
        labels: of the run, as they are stored.
        created: how many steps were created, including those deleted since.
        order: the completed steps, in order of completion.
        fields: the fields of the hash: field, value, field, value, ….
    """

    run_id: str
    ttl_ms: bytes
    labels: bytes
    created: int
    order: list[bytes]
    fields: list[bytes]


# Export


def to_document(run_id: str, key: bytes, fields: dict[bytes, bytes], order: list[str], payloads: Payloads) -> Document:
    """Returns the document of a run.

    Raises:
        CorruptRunError: the scripts would not write a record. It names `key`.
    """
    _, created, _, *expiry = fields[b"r"].removesuffix(b" c").split(b" ")
    histories: dict[bytes, list[tuple[int, bytes]]] = {}
    for name, entry in fields.items():
        if match := _HISTORY.fullmatch(name):
            histories.setdefault(match[2], []).append((int(match[1]), entry))
    steps: list[Document] = []
    completed = set(order)
    for name, line in fields.items():
        if name[:1] != b"s":
            continue
        step = step_name(run_id, name[1:], key)
        state, rest = _state(run_id, key, step, line)
        is_completed = state["state"] == "completed"
        if b"i" + name[1:] not in fields or {is_completed} != {step in completed, b"o" + name[1:] in fields}:
            raise corrupt(run_id, key.decode(), f"s{step}")

        def payload(kind: bytes, called: str, step: str = step, line: bytes = line) -> Any:
            data = fields.get(kind + step.encode())
            return None if data is None else _payload_out(line, data, run_id, step, called, payloads)

        stored = progress_payload(run_id, step, fields.get(b"p" + step.encode()), key)
        progress = None if stored is None else _payload_out(line, stored, run_id, step, "progress", payloads)
        history: list[Document] = []
        for _, entry in sorted(histories.get(name[1:], [])):
            past, _, error = entry.partition(b"\n")
            decoded = _payload_out(past, error, run_id, step, "error", payloads) if error else None
            history.append({**_state(run_id, key, step, past)[0], "error": decoded})
        steps.append(
            {
                "step": step,
                **rest,
                **state,
                "input": payload(b"i", "input"),
                "fingerprint": _fingerprint(run_id, key, step, fields.get(b"f" + name[1:])),
                "output": payload(b"o", "output"),
                "last_error": payload(b"e", "last_error"),
                "progress": progress,
                "history": history,
            }
        )
    if lost := completed.difference(each["step"] for each in steps):
        raise corrupt(run_id, key.decode(), f"s{min(lost)}")
    return {
        "squidstep_run": VERSION,
        "run_id": run_id,
        "ttl": int(expiry[0]) / 1_000 if expiry else None,
        "labels": parse_labels(fields.get(b"l", b"")),
        "cancel_reason": fields[b"c"].decode(errors="replace") if b"c" in fields else None,
        "steps_created": int(created),
        "completed": order,
        "steps": sorted(steps, key=lambda step: cast("int", step["position"])),
    }


def _state(run_id: str, key: bytes, step: str, line: bytes) -> tuple[Document, Document]:
    """Returns what a state line says about the attempt, and what it says about the step."""
    try:
        state = StateLine.parse(line)
    except ValueError:
        problem = f"field {f's{step}'!r} is not what squidstep_redis writes"
        raise CorruptRunError(run_id, key.decode(), problem) from None
    until = state.ms_after_start(state.lease)
    return {
        "state": _STATES[state.letter],
        "attempt": int(state.attempt),
        "attempts_released": int(state.released or 0),
        "token": state.token.decode(),
        "owner": state.owner.decode() or None,
        "started_at": _time(state.started_ms),
        "lease_ends_at": _time(until) if state.letter == b"r" else None,
        "retry_at": _time(until) if state.letter == b"f" else None,
        "ended_at": _time(state.ms_after_start(state.ended)),
    }, {
        "position": int(state.position),
        "created_at": _time(state.created_ms),
        "scheduled_by": state.scheduled_by.decode(),
    }


def _fingerprint(run_id: str, key: bytes, step: str, data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        return arguments.fingerprint(data.decode()).decode()
    except ValueError:  # also that of an InvalidArgumentError
        raise corrupt(run_id, key.decode(), f"f{step}") from None


def _time(ms: int | None) -> str | None:
    return None if ms is None else moment(ms).isoformat(timespec="milliseconds")


def _payload_out(line: bytes, data: bytes, run_id: str, step: str, name: str, payloads: Payloads) -> Any:
    """Returns a payload as JSON, or its bytes if the codec cannot read them or JSON cannot represent the value."""
    if data == LEASE_EXPIRED and line[1:2] == b"x" and name not in ("input", "output"):
        return lease_expired_error()
    try:
        return to_json(payloads.decode(data, run_id, step, name))
    except (UndecodablePayloadError, TypeError):
        return {"$encoded": b64encode(data).decode()}


# Import


def from_document(document: object, payloads: Payloads) -> Imported:
    """Reads a document, and checks that it describes a run.

    Raises:
        InvalidArgumentError: `to_document` would not return it; the message has the path to the offending value.
            PayloadError for a payload that the store's codec rejects.
    """
    doc = _Part(document, "document")
    version: object = doc.value("squidstep_run")
    if type(version) is not int or version != VERSION:
        doc.reject("squidstep_run", f"must be {VERSION}: it is not a run, or a later version exported it")
    run_id = doc.read("run_id", arguments.run_id).text
    ttl_ms = doc.read("ttl", lambda ttl: arguments.milliseconds("ttl", cast("float | None", ttl)))
    labels = doc.read("labels", labels_data)
    created = doc.number("steps_created")
    fields = _cancellation_in(doc)
    completed: set[bytes] = set()
    seen: set[bytes] = set()
    positions: set[int] = set()
    for part in doc.parts("steps"):
        step = part.read("step", arguments.step).data
        position = part.number("position")
        if step in seen or position in positions or not 1 <= position <= created:
            part.reject("position", f"must be unique, from 1 to steps_created, and {step.decode()!r} must occur once")
        seen.add(step)
        positions.add(position)
        line = _line(part, part, position)
        is_completed = line[1:2] == b"c"
        to = _Target(payloads, run_id, step.decode())
        fields += [b"s" + step, line, b"i" + step, to.payload(part, "input", "input")]
        if part.value("fingerprint") is not None:
            fields += [b"f" + step, part.read("fingerprint", arguments.fingerprint)]
        if is_completed:
            completed.add(step)
            fields += [b"o" + step, to.payload(part, "output", "output")]
        if part.value("last_error") is not None:
            fields += [b"e" + step, to.error(part, "last_error", line)]
        if part.value("progress") is not None:
            if is_completed or not part.number("attempt"):
                part.reject("progress", "must be null: the step is completed, or was never claimed")
            progress = to.payload(part, "progress", "progress")
            fields += [b"p" + step, IMPORTED_CHECKPOINT + progress, b"w" + step, b"p"]
        attempt = part.number("attempt")
        past_numbers: set[int] = set()
        for past in part.parts("history"):
            number = past.number("attempt")
            if number in past_numbers or not 1 <= number < attempt or attempt - number > 8:
                past.reject("attempt", "must be unique, and one of the eight numbers before the step's attempt")
            past_numbers.add(number)
            past_line = _line(past, part, position)
            error = b"" if past.value("error") is None else to.error(past, "error", past_line)
            fields += [b"a%d:%b" % (number, step), past_line + b"\n" + error]
    order = [arguments.step(step, "document['completed']").data for step in doc.list_of("completed")]
    if len(order) != len(completed) or set(order) != completed:
        doc.reject("completed", "must name each completed step once")
    if not seen:
        doc.reject("steps", "must have at least one item")
    return Imported(run_id, ttl_ms, labels, created, order, fields)


def _cancellation_in(doc: _Part) -> list[bytes]:
    """Returns the field of a cancelled run, and its value."""
    cancelled = doc.value("cancel_reason")
    if cancelled is None:
        return []
    is_empty = isinstance(cancelled, str) and not cancelled
    return [b"c", b"" if is_empty else doc.read("cancel_reason", arguments.reason)]


class _Part:
    """An object in a document, with its path."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, Mapping):
            raise InvalidArgumentError(path, f"must be an object, not {described(value)}")
        self.items = cast("Mapping[str, Any]", value)
        self.path = path

    def reject(self, name: str, problem: str) -> None:
        raise InvalidArgumentError(f"{self.path}[{name!r}]", problem)

    def value(self, name: str) -> Any:
        return self.items.get(name)

    def read(self, name: str, read: Callable[[Any], Any]) -> Any:
        try:
            return read(self.items.get(name))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{self.path}[{name!r}]", error.problem) from error

    def number(self, name: str) -> int:
        return self.read(name, lambda value: arguments.integer(name, value, _MAX_NUMBER, minimum=0))

    def list_of(self, name: str) -> list[Any]:
        value: Any = self.items.get(name)
        if not isinstance(value, list):
            self.reject(name, f"must be a list, not {described(value)}")
        return cast("list[Any]", value)

    def parts(self, name: str) -> list[_Part]:
        return [_Part(item, f"{self.path}[{name!r}][{index}]") for index, item in enumerate(self.list_of(name))]

    def text(self, name: str) -> bytes:
        value = self.items.get(name)
        if not isinstance(value, str) or not _TOKEN.fullmatch(value):
            self.reject(name, f"must be a str of up to 64 printable ASCII characters, not {described(value)}")
        return cast("str", value).encode()

    def time(self, name: str) -> datetime | None:
        value = self.items.get(name)
        if value is None:
            return None
        try:
            read = datetime.fromisoformat(value)
            if read.tzinfo is None or not moment(0) <= read < moment(10**13):
                raise ValueError(value)
        except (TypeError, ValueError):
            self.reject(name, f"must be an ISO 8601 time with a time zone, not {described(value)}")
            raise
        return read


def _line(part: _Part, step: _Part, position: int) -> bytes:
    """Returns the state line of a step, or of one of its past attempts."""
    created, started = step.time("created_at"), part.time("started_at")
    lease_end, retry_at, ended = part.time("lease_ends_at"), part.time("retry_at"), part.time("ended_at")
    letter = _LETTERS.get(str(part.value("state")))
    attempt, token = part.number("attempt"), part.text("token")
    if letter is None or created is None:
        part.reject("state", f"must be one of {', '.join(_LETTERS)}, and have a created_at")
    fits = {
        b"p": attempt == 0 or bool(ended),
        b"r": bool(started and token and attempt) and not ended,
        **dict.fromkeys((b"c", b"f", b"x", b"n"), bool(started and ended and token and attempt)),
    }
    if (
        not fits[letter or b""]
        or bool(started) != bool(attempt)
        or ((lease_end and letter != b"r") or (retry_at and letter != b"f"))
    ):
        part.reject("state", f"does not match its attempt, token and times: {described(part.value('state'))}")
    owner = part.read("owner", arguments.owner)
    lease, start, end = _span(started, lease_end or retry_at), _span(created, started), _span(started, ended)
    if min(lease, start, end) < -1:
        part.reject("started_at", "must not be before created_at, nor after the attempt's end")
    lease_span, start_span, end_span = (b"" if span == -1 else b"%d" % span for span in (lease, start, end))
    released = part.number("attempts_released")
    created_ms = (cast("datetime", created) - moment(0)) // _MILLISECOND
    return StateLine(
        letter or b"",
        b"%d" % attempt,
        b"%d" % released if released else b"",
        token,
        lease_span,
        start_span,
        end_span,
        b"%d" % created_ms,
        b"%d" % position,
        step.text("scheduled_by"),
        owner,
    ).format()


def _span(since: datetime | None, to: datetime | None) -> int:
    """Returns milliseconds; -1 if one of the times is missing, -2 if they are in the wrong order."""
    if since is None or to is None:
        return -1
    span = (to - since) // _MILLISECOND
    return span if span >= 0 else -2


class _Target(NamedTuple):
    """A step whose payloads are encoded.

    Attributes:
        payloads: encodes them.
        run_id: the run.
        step: the step.
    """

    payloads: Payloads
    run_id: str
    step: str

    def payload(self, part: _Part, name: str, field: PayloadField) -> bytes:
        """Returns a payload of a document as it is stored."""
        value = part.value(name)
        path = f"{part.path}[{name!r}]"
        try:
            if isinstance(value, dict) and cast("Document", value).keys() == {"$encoded"}:
                data = bytes_from_text(cast("Document", value)["$encoded"])
                if not data:
                    raise ValueError("$encoded is empty")
                self.payloads.check_size(path, data)
                return data
            payload = from_json(value)
        except InvalidArgumentError:
            raise
        except RecursionError as error:
            raise InvalidArgumentError(path, "is not an exported payload: it is nested too deeply") from error
        except (ValueError, TypeError, ArithmeticError) as error:
            raise InvalidArgumentError(path, f"is not an exported payload: {escaped(str(error))}") from error
        return self.payloads.encode(path, payload, self.run_id, self.step, field)

    def error(self, part: _Part, name: str, line: bytes) -> bytes:
        """Returns the error of an attempt, whose state line is given, as it is stored."""
        if line[1:2] == b"x" and part.value(name) == lease_expired_error():
            return LEASE_EXPIRED
        return self.payload(part, name, "error")
