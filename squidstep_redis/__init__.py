"""Decides, atomically in Redis, which delivery of a step executes. Start at `StepRunStore` or `AsyncStepRunStore`."""

from squidstep_redis.aio import AsyncClaim, AsyncStepRunStore
from squidstep_redis.calls import Calls
from squidstep_redis.checks import Level
from squidstep_redis.claims import current_claim
from squidstep_redis.codec import Codec, MsgpackCodec
from squidstep_redis.doctor import Diagnosis, Finding
from squidstep_redis.errors import (
    CorruptRunError,
    InvalidArgumentError,
    NewerFormatError,
    NotReplicatedError,
    NotSentError,
    OutcomeUnknownError,
    PayloadError,
    PayloadTooLargeError,
    RefusedError,
    ReplyMismatchError,
    RunDeletedError,
    RunExistsError,
    ServerError,
    SquidstepError,
    StaleStepRunError,
    StepBusyError,
    StepExhaustedError,
    StepRunNotFoundError,
    UndecodablePayloadError,
    UnsupportedClientError,
    WaitTimeoutError,
)
from squidstep_redis.events import Event
from squidstep_redis.model import (
    Attempt,
    BeginResult,
    ClaimCounts,
    Outcome,
    RunPage,
    RunSummary,
    ScheduleResult,
    StepRun,
    StepStatus,
)
from squidstep_redis.store import Claim, StepRunStore
from squidstep_redis.wire import Call, Queued

__all__ = [
    "AsyncClaim",
    "AsyncStepRunStore",
    "Attempt",
    "BeginResult",
    "Call",
    "Calls",
    "Claim",
    "ClaimCounts",
    "Codec",
    "CorruptRunError",
    "Diagnosis",
    "Event",
    "Finding",
    "InvalidArgumentError",
    "Level",
    "MsgpackCodec",
    "NewerFormatError",
    "NotReplicatedError",
    "NotSentError",
    "Outcome",
    "OutcomeUnknownError",
    "PayloadError",
    "PayloadTooLargeError",
    "Queued",
    "RefusedError",
    "ReplyMismatchError",
    "RunDeletedError",
    "RunExistsError",
    "RunPage",
    "RunSummary",
    "ScheduleResult",
    "ServerError",
    "SquidstepError",
    "StaleStepRunError",
    "StepBusyError",
    "StepExhaustedError",
    "StepRun",
    "StepRunNotFoundError",
    "StepRunStore",
    "StepStatus",
    "UndecodablePayloadError",
    "UnsupportedClientError",
    "WaitTimeoutError",
    "current_claim",
]
