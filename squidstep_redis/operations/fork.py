"""The operation that copies completed steps of a run to a new run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from squidstep_redis.errors import InvalidArgumentError, RunExistsError, StaleStepRunError, StepRunNotFoundError
from squidstep_redis.model import StateLine, StepRun, StepStatus
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.documents import Imported
from squidstep_redis.operations.export import write_run
from squidstep_redis.operations.reads import pairs, step_statuses
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Name, RunId, Step
from squidstep_redis.protocol.call import Call, Reply, corrupt, new_nonce
from squidstep_redis.protocol.keys import Run
from squidstep_redis.protocol.records import LEASE_EXPIRED, NO_PAYLOADS, step_name
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import Send, Workflow
from squidstep_redis.server_errors import OutcomeUnknownError, ServerError

_OPERATION: Final = "fork_run"
# A field of a step that a fork copies: from an attempt in its history, or from its record. lua/README.md lists the
# fields. The mark of a waiting client is not copied.
_FIELD: Final = re.compile(rb"a\d+:(.+)|[^aw](.+)", re.DOTALL)

_PAYLOADS: Final = {b"i": "input", b"o": "output", b"e": "last_error"}

_by_position = attrgetter("position")


def fork_run(
    context: Context,
    run_id: RunId,
    new_run_id: RunId,
    *,
    steps: Iterable[Step] | None = None,
    through: Step | None = None,
    dry_run: bool = False,
) -> Workflow[list[str]]:
    """Creates a run that has the completed steps of another run. The original is left unchanged.

    For example, to execute a failed step and all later steps again. Two round trips, all or nothing. The original is
    read at one moment, which blocks the server for about 0.05 s if it has 10,000 steps; writing them takes 0.15 s.

    The new run has the labels of the original. A copied step keeps its input, output, owner, times, attempt number and
    history. Payloads are copied as bytes, of any size and codec; only a codec whose bytes depend on the run encodes
    them again. The order of creation and the completion order are numbered from 1 again. Steps that are not completed,
    claims and the expiry of the original are not copied: the new run expires by this store's `run_ttl`. The id of a
    step run contains its run id, so a claim on a step of the original changes nothing in the new run.

    Args:
        run_id: the original: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        new_run_id: the run to create: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        steps: exactly these steps, each once; None: see `through`.
        through: the completed steps up to and including this one, in completion order; None: all completed steps. Not
            together with `steps`.
        dry_run: whether to write nothing and only return what would be copied.

    Returns:
        The steps of the new run, in completion order.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        RunExistsError: the new run exists; nothing was written.
        StepRunNotFoundError: there is no such run or step, or no completed step; nothing was written. RunDeletedError
            if one of the two runs was deleted recently.
        StaleStepRunError: a given step is not completed; nothing was written.
        CorruptRunError: the stored data is corrupt; nothing was written.
        UndecodablePayloadError: the codec's bytes depend on the run, and it cannot read a payload; nothing was written.
        ServerError: the server or the connection failed. After an OutcomeUnknownError, the call in its `call` can be
            re-sent, and takes effect once; after any other, nothing was written.
    """
    source, new = context.keys.run(run_id), _new_run(context, new_run_id)
    if source.text == new.text:
        raise InvalidArgumentError("new_run_id", f"must differ from the original run, {source.text!r}")
    if steps is not None and through is not None:
        raise InvalidArgumentError("through", "must not be given together with steps")
    names = None if steps is None else arguments.steps(steps)
    if names == []:
        raise InvalidArgumentError("steps", "must name at least one step")
    last = None if through is None else arguments.step(through, "through")
    return _fork_run(context, source, new, names, last, dry_run)


def _new_run(context: Context, new_run_id: RunId) -> Run:
    try:
        return context.keys.run(new_run_id)
    except InvalidArgumentError as error:
        raise InvalidArgumentError("new_run_id", error.problem) from None


def _fork_run(
    context: Context, source: Run, new: Run, names: list[Name] | None, last: Name | None, dry_run: bool
) -> Workflow[list[str]]:
    try:
        reply: Reply = yield Send(_read_run(source))
    except OutcomeUnknownError as error:
        # Re-sending the read would create nothing, so the caller must not receive its call.
        problem = f"{error.problem}. It was reading the run, so nothing was written; call {_OPERATION} again"
        raise ServerError(_OPERATION, source.text, None, problem, error.transient) from error
    fields, order = dict(pairs(reply[2])), list(reply[3])
    completed = set(order)
    for name in names or ([last] if last else []):
        if name.data not in completed:
            raise _refusal(context, source, name, fields)
    if names is not None:
        chosen = {name.data for name in names}
        order = [step for step in order if step in chosen]
    elif last is not None:
        order = order[: order.index(last.data) + 1]
    if not order:
        raise StepRunNotFoundError(source.text, None, "no step of it is completed; nothing was written")
    forked = {step: _completed(context, source, step, fields) for step in order}
    copied = [each.step for each in forked.values()]
    if dry_run:
        found = step_statuses(context, new.text)._replace(if_deleted=None, part_of=_OPERATION)
        if (yield Send(found)):
            raise RunExistsError(new.text)
        return copied
    copies = _fields(context, source, new, forked, fields)
    given = Imported(new.text, context.run_ttl_ms, fields.get(b"l", b""), len(order), order, copies)
    return (yield Send(write_run(context, given, copied, _OPERATION)))


def _read_run(run: Run) -> Call[Reply]:
    def parse(reply: Reply) -> Reply:
        if reply[0] == b"missing":
            raise StepRunNotFoundError(run.text, None, "there is no such run; nothing was written")
        return reply

    return Call(run.text, script("export_run"), run.keys[:2], (new_nonce(),), parse, part_of=_OPERATION)


def _completed(context: Context, run: Run, step: bytes, fields: dict[bytes, bytes]) -> StepRun:
    """Returns the step run of a step in the completion order; raises CorruptRunError unless it is completed."""
    step_run = _step_run(context, run, Name(step_name(run.text, step, run.keys.done), step), fields)
    if step_run.status is not StepStatus.COMPLETED:
        raise corrupt(run.text, run.keys.steps.decode(), f"s{step_run.step}")
    return step_run


def _refusal(context: Context, run: Run, name: Name, fields: dict[bytes, bytes]) -> Exception:
    """Returns the error for a given step that is not in the completion order."""
    if b"s" + name.data not in fields:
        return StepRunNotFoundError(run.text, name.text, "there is no such step run; nothing was written")
    step_run = _step_run(context, run, name, fields)
    if step_run.status is StepStatus.COMPLETED:
        return corrupt(run.text, run.keys.steps.decode(), f"s{name.text}")
    return StaleStepRunError(
        step_run, f"{_OPERATION} was refused: the step is {step_run.status}, not completed. Nothing was written"
    )


def _step_run(context: Context, run: Run, name: Name, fields: dict[bytes, bytes]) -> StepRun:
    values = [fields.get(kind + name.data) for kind in (b"s", b"i", b"o", b"e", b"p")]
    return context.records.record(run.text, name.text, values, run.keys.steps)


def _fields(
    context: Context, run: Run, new: Run, steps: dict[bytes, StepRun], fields: dict[bytes, bytes]
) -> list[bytes]:
    """Returns all fields of these steps as the new run stores them: field, value, field, value, ….

    Raises:
        CorruptRunError: the scripts would not write the state line of an attempt.
        UndecodablePayloadError: the codec's bytes depend on the run, and it cannot read them.
    """
    created = {each.step: b"%d" % position for position, each in enumerate(sorted(steps.values(), key=_by_position), 1)}
    copied: list[bytes] = []

    def moved(data: bytes, step: str, name: str) -> bytes:
        return context.payloads.moved(data, run.text, step, name, new.text)

    for field, stored in fields.items():
        match = _FIELD.fullmatch(field)
        step_run = steps.get(match[1] or match[2]) if match else None
        if step_run is None:
            continue
        value = stored
        if field[:1] in (b"s", b"a"):
            line, line_break, error = stored.partition(b"\n")
            # It raises the typed error if this is no state line.
            context.records.step_run(run.text, step_run.step, line, NO_PAYLOADS, run.keys.steps)
            if error and error != LEASE_EXPIRED:
                error = moved(error, step_run.step, "error")
            value = StateLine.parse(line)._replace(position=created[step_run.step]).format() + line_break + error
        elif (name := _PAYLOADS.get(field[:1])) is not None:
            value = moved(stored, step_run.step, name)
        copied += (field, value)
    return copied
