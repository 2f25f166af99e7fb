"""Waiting until a step has ended."""

from __future__ import annotations

from typing import Final

from squidstep_redis.errors import WaitTimeoutError
from squidstep_redis.model import StepRun
from squidstep_redis.operations.context import Context
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Name, RunId, Seconds, Step
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.keys import Run
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import BlockOnStream, Send, Sleep, Workflow
from squidstep_redis.server_errors import ServerError
from squidstep_redis.steady import steady_time as time

_FIRST_POLL: Final = 0.02  # seconds between the first two polls for a record that does not exist yet
_LAST_POLL: Final = 1.0
_LAST_ATTEMPT: Final = 0.1  # seconds that the last poll has for a connection


def wait_for_step(context: Context, run_id: RunId, step: Step, timeout: Seconds) -> Workflow[StepRun]:
    """Waits until a step is completed or failed, so that a skipped duplicate can return the winner's output.

    The script that ends the step notifies the waiter. A notification can be lost, so the waiter also polls once a
    second, and more often while the step has no record: one round trip per poll, one per pause. Meanwhile, it occupies
    one connection.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).
        timeout: seconds to wait, from 0.001 to a day; if the server does not reply, one attempt more.

    Returns:
        The completed or failed step run. If a failed step is retried, call this again to wait for the new attempt.

    Raises:
        WaitTimeoutError: the step did not end in time, as far as it could be read.
        RunDeletedError: the run was deleted.
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed, for the store's timeout, or before the first poll had a reply.
    """
    run = context.keys.run(run_id)
    name = arguments.step(step)
    limit = arguments.seconds("timeout", timeout, arguments.MAX_WAIT)
    return _wait(context, run, name, limit)


def _wait(context: Context, run: Run, step: Name, limit: float) -> Workflow[StepRun]:
    end = time.monotonic() + limit
    pause = _FIRST_POLL
    step_run, has_polled = None, False
    while True:
        left = end - time.monotonic()
        try:
            step_run, last = yield Send(_await_step(context, run, step), max(left, _LAST_ATTEMPT))
        except ServerError as error:
            if has_polled and error.transient and time.monotonic() >= end:  # which was too soon for a reply
                raise WaitTimeoutError(run.text, step.text, limit, step_run) from error
            raise
        has_polled = True
        if step_run is not None and last is None:
            return step_run
        left = end - time.monotonic()
        if left <= 0:
            raise WaitTimeoutError(run.text, step.text, limit, step_run)
        if last is None:
            yield Sleep(min(pause, left))
            pause = min(2 * pause, _LAST_POLL)
        else:
            has_reply = yield BlockOnStream(run.stream, last, min(left, _LAST_POLL))
            if not has_reply and time.monotonic() > end + _LAST_ATTEMPT:  # a further attempt might take as long
                raise WaitTimeoutError(run.text, step.text, limit, step_run)


def _await_step(context: Context, run: Run, step: Name) -> Call[tuple[StepRun | None, bytes | None]]:
    """Reads the step run and, if it has not ended, the id of the stream entry after which to wait."""

    def parse(reply: Reply) -> tuple[StepRun | None, bytes | None]:
        if reply[0] == b"missing":
            return None, None
        values = [value or None for value in reply[2:7]]
        last = reply[7] if reply[0] == b"waiting" else None
        return context.records.record(run.text, step.text, values, run.keys.steps), last

    args = (new_nonce(), step.data)
    return Call(run.text, script("await_step"), run.keys[:2], args, parse, step=step.text, part_of="wait_for_step")
