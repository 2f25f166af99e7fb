"""Decides, atomically in Redis, which delivery of a step executes. Start at `StepRunStore` or `AsyncStepRunStore`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from squidstep_redis.aio import AsyncClaim, AsyncStepRunStore
    from squidstep_redis.claims.rules import current_claim
    from squidstep_redis.doctor.checks import Level
    from squidstep_redis.doctor.examine import Diagnosis, Finding
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
    from squidstep_redis.model import (
        Attempt,
        BeginResult,
        ClaimCounts,
        Outcome,
        RunPage,
        RunSummary,
        ScheduleResult,
        StepPage,
        StepRun,
        StepStatus,
    )
    from squidstep_redis.operations.calls import Calls
    from squidstep_redis.protocol.call import Call, Queued
    from squidstep_redis.protocol.codec import Codec, MsgpackCodec
    from squidstep_redis.store import Claim, StepRunStore
    from squidstep_redis.transport.events import Event

# Where each name comes from, when it is first asked for: pytest loads this package's plugin in every project, and shall
# not load redis-py with it.
_HOMES = {
    "AsyncClaim": "aio",
    "AsyncStepRunStore": "aio",
    "Attempt": "model",
    "BeginResult": "model",
    "Call": "protocol.call",
    "Calls": "operations.calls",
    "Claim": "store",
    "ClaimCounts": "model",
    "Codec": "protocol.codec",
    "CorruptRunError": "errors",
    "Diagnosis": "doctor.examine",
    "Event": "transport.events",
    "Finding": "doctor.examine",
    "InvalidArgumentError": "errors",
    "Level": "doctor.checks",
    "MsgpackCodec": "protocol.codec",
    "NewerFormatError": "errors",
    "NotReplicatedError": "errors",
    "NotSentError": "errors",
    "Outcome": "model",
    "OutcomeUnknownError": "errors",
    "PayloadError": "errors",
    "PayloadTooLargeError": "errors",
    "Queued": "protocol.call",
    "RefusedError": "errors",
    "ReplyMismatchError": "errors",
    "RunDeletedError": "errors",
    "RunExistsError": "errors",
    "RunPage": "model",
    "RunSummary": "model",
    "ScheduleResult": "model",
    "ServerError": "errors",
    "SquidstepError": "errors",
    "StaleStepRunError": "errors",
    "StepBusyError": "errors",
    "StepExhaustedError": "errors",
    "StepPage": "model",
    "StepRun": "model",
    "StepRunNotFoundError": "errors",
    "StepRunStore": "store",
    "StepStatus": "model",
    "UndecodablePayloadError": "errors",
    "UnsupportedClientError": "errors",
    "WaitTimeoutError": "errors",
    "current_claim": "claims.rules",
}

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
    "StepPage",
    "StepRun",
    "StepRunNotFoundError",
    "StepRunStore",
    "StepStatus",
    "UndecodablePayloadError",
    "UnsupportedClientError",
    "WaitTimeoutError",
    "current_claim",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
