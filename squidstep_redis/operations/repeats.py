"""Recognizes a repeated call whose payload equals the stored one, but is encoded differently.

The scripts compare bytes. Equal dicts may have their keys in a different order, and a codec may encrypt.
"""

from __future__ import annotations

from squidstep_redis.errors import UndecodablePayloadError
from squidstep_redis.model import StepRun, StepStatus
from squidstep_redis.operations.context import Context
from squidstep_redis.protocol.arguments import Name
from squidstep_redis.protocol.call import Reply
from squidstep_redis.protocol.keys import Run


def completed_before(
    context: Context, run: Run, step: Name, token: bytes, output: bytes, reply: Reply
) -> StepRun | None:
    """Returns the completed step run if the same claim completed it with an equal output.

    Args:
        context: the store's settings.
        run: the run.
        step: the step.
        token: token of the claim; empty: any claim.
        output: the output, as it was sent.
        reply: the script's refusal, which has the record.
    """
    current = context.records.record(run.text, step.text, reply[2:7], run.keys.steps)
    if current.status is not StepStatus.COMPLETED or token not in (b"", current.current_token):
        return None
    return current if are_equal(context, run, step, "output", reply[4], output) else None


def are_equal(context: Context, run: Run, step: Name, name: str, stored: bytes, sent: bytes) -> bool:
    """Returns whether two encoded payloads of a step decode to equal ones."""
    decode = context.payloads.decode
    try:
        return decode(stored, run.text, step.text, name) == decode(sent, run.text, step.text, name)
    except UndecodablePayloadError:
        return False
