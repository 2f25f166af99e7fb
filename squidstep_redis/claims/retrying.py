"""How claims retry: with pauses that grow, and for longer than the store's timeout. No I/O."""

from __future__ import annotations

import random
from typing import Any, Final, TypeVar

from squidstep_redis.errors import CorruptRunError, InputMismatchError, SquidstepError, StepRunNotFoundError
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.workflow import Send, Sleep, Workflow
from squidstep_redis.server_errors import NotSentError, OutcomeUnknownError, RefusedError, ServerError
from squidstep_redis.steady import steady_time as time

T = TypeVar("T")

FIRST_PAUSE: Final = 0.05
LAST_PAUSE: Final = 1.0
SHORTEST: Final = 0.1  # seconds in which the last call has to find a connection


def retry_until(call: Call[T], deadline: float) -> Workflow[T]:
    """Sends a call for the store's timeout, and retries transient errors until a deadline (monotonic clock)."""
    pause, seconds = FIRST_PAUSE, None
    while True:
        try:
            return (yield Send(call, seconds))
        except ServerError as error:
            if isinstance(error, OutcomeUnknownError):  # from now on, no error may say that nothing was sent
                call = call._replace(may_have_run=True)
            if not error.transient or time.monotonic() + pause > deadline:
                raise
        yield Sleep(jittered(pause))
        pause = min(2 * pause, LAST_PAUSE)
        seconds = max(deadline - time.monotonic(), SHORTEST)


def jittered(seconds: float) -> float:
    """Adds ±25 % jitter."""
    return seconds * random.uniform(0.75, 1.25)


def is_refusal(error: SquidstepError, call: Call[Any]) -> bool:
    """Whether an error says that this call wrote nothing. A signal handler may have raised an error of another call."""
    if not isinstance(error, NotSentError | RefusedError | StepRunNotFoundError | CorruptRunError | InputMismatchError):
        return False
    return error.run_id == call.run_id and getattr(error, "step", None) in (call.step, None)
