"""Claims that their own code cannot end, and the calls that are sent instead. This module does no I/O.

An exception from outside (a signal handler, a cancellation) interrupted the code, or the server did not reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Final, cast

from squidstep_redis.claims.failures import AT_ONCE, Verdict
from squidstep_redis.errors import SquidstepError
from squidstep_redis.model import BeginResult, StepRun
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.workflow import Send, Workflow
from squidstep_redis.server_errors import NotReplicatedError

INTERRUPTED_SECONDS: Final = 1.0
"""How long the interrupted code of a block waits for its claim to be given back or recorded as failed."""


class UnfinishedClaim:
    """A claim that its own code cannot end, and the calls to send instead.

    Attributes:
        begin: the call that was sent to acquire it, if its work has not begun: the claim is given back.
        step_run: the step run that carries the claim, if its work has begun: it is recorded as failed.
        error: the error that interrupted its code, or that the work raised.
        verdict_of: returns what the error means for the next attempt; None: it can begin at once.
        checkpoint: the call that stores the progress that no extension has carried; None if there is none.
        deadline: how long to retry while the server cannot be reached, on the monotonic clock.
        is_recovered: whether nothing remains to be done.
    """

    begin: Call[BeginResult] | None = None
    step_run: StepRun | None = None
    error: BaseException | None = None
    verdict_of: Callable[[BaseException], Verdict] | None = None
    checkpoint: Call[StepRun] | None = None
    deadline: float = math.inf
    is_recovered: bool = False

    @property
    def is_of_dead_process(self) -> bool:
        """Whether the error stands for the end of the process (in tests): then nothing is sent."""
        return ends_process(self.error)


def ends_process(error: BaseException | None) -> bool:
    """Returns whether an error stands for the end of the process, in tests: then nothing is sent any more.

    So does a group that contains one: asyncio and anyio wrap what a task of a group raises.
    """
    if isinstance(error, BaseExceptionGroup):
        return any(map(ends_process, cast("BaseExceptionGroup[BaseException]", error).exceptions))
    return bool(getattr(error, "ends_process", False))


def recover(calls: Calls, unfinished: UnfinishedClaim) -> Workflow[None]:
    """Gives back a claim that its own code could not end, or records it as failed. One attempt.

    Raises:
        SquidstepError: there is nothing to do, because the step was taken over or deleted; or, if it is a ServerError,
            the server did not do it.
    """
    try:
        if unfinished.begin is not None:
            yield from give_back(calls, unfinished.begin)
        elif unfinished.step_run is not None and unfinished.error is not None:
            if unfinished.checkpoint is not None:
                with suppress(SquidstepError):  # recording the failure has the same problem
                    yield Send(unfinished.checkpoint)
            verdict = unfinished.verdict_of(unfinished.error) if unfinished.verdict_of else AT_ONCE
            yield Send(calls.fail_step(unfinished.step_run, unfinished.error, **verdict._asdict()))
    except NotReplicatedError:  # done; the replicas no longer matter
        return


def give_back(calls: Calls, begin: Call[BeginResult]) -> Workflow[None]:
    """Releases the claim that a call may have acquired: the call is sent again, and returns the same decision."""
    try:
        result = yield Send(begin)
    except NotReplicatedError as error:
        result = error.result
    if result.decision == "execute":
        yield Send(calls.release_step(result.step_run))
