"""Decides, atomically in Redis, which delivery of a step executes. Start at `StepRunStore` or `AsyncStepRunStore`."""

from squidstep_redis.aio import AsyncStepRunStore
from squidstep_redis.calls import Calls
from squidstep_redis.codec import Codec, MsgpackCodec
from squidstep_redis.errors import (
    CorruptRunError,
    InvalidArgumentError,
    NewerFormatError,
    PayloadError,
    PayloadTooLargeError,
    ReplyMismatchError,
    RunDeletedError,
    SquidstepError,
    StaleStepRunError,
    StepRunNotFoundError,
    UndecodablePayloadError,
    UnsupportedClientError,
)
from squidstep_redis.model import Attempt, BeginResult, Outcome, ScheduleResult, StepRun, StepStatus
from squidstep_redis.store import StepRunStore
from squidstep_redis.wire import Call, Queued

__all__ = [
    "AsyncStepRunStore",
    "Attempt",
    "BeginResult",
    "Call",
    "Calls",
    "Codec",
    "CorruptRunError",
    "InvalidArgumentError",
    "MsgpackCodec",
    "NewerFormatError",
    "Outcome",
    "PayloadError",
    "PayloadTooLargeError",
    "Queued",
    "ReplyMismatchError",
    "RunDeletedError",
    "ScheduleResult",
    "SquidstepError",
    "StaleStepRunError",
    "StepRun",
    "StepRunNotFoundError",
    "StepRunStore",
    "StepStatus",
    "UndecodablePayloadError",
    "UnsupportedClientError",
]
