"""The public names for type checkers; `__init__.py` loads them on first use."""

from squidstep_redis.aio import (
    AsyncStepRunStore as AsyncStepRunStore,
)
from squidstep_redis.claims.aio_claim import (
    AsyncClaim as AsyncClaim,
)
from squidstep_redis.claims.claim import (
    Claim as Claim,
)
from squidstep_redis.claims.failures import (
    ExponentialBackoff as ExponentialBackoff,
)
from squidstep_redis.claims.failures import (
    PermanentError as PermanentError,
)
from squidstep_redis.claims.failures import (
    RetryLater as RetryLater,
)
from squidstep_redis.claims.request import (
    ClaimSettings as ClaimSettings,
)
from squidstep_redis.claims.request import (
    FunctionSettings as FunctionSettings,
)
from squidstep_redis.claims.request import (
    StepSettings as StepSettings,
)
from squidstep_redis.claims.rules import (
    current_claim as current_claim,
)
from squidstep_redis.doctor.checks import (
    Level as Level,
)
from squidstep_redis.doctor.examine import (
    Diagnosis as Diagnosis,
)
from squidstep_redis.doctor.examine import (
    Finding as Finding,
)
from squidstep_redis.errors import (
    CorruptRunError as CorruptRunError,
)
from squidstep_redis.errors import (
    InputMismatchError as InputMismatchError,
)
from squidstep_redis.errors import (
    InvalidArgumentError as InvalidArgumentError,
)
from squidstep_redis.errors import (
    NewerFormatError as NewerFormatError,
)
from squidstep_redis.errors import (
    PayloadError as PayloadError,
)
from squidstep_redis.errors import (
    PayloadNotReadError as PayloadNotReadError,
)
from squidstep_redis.errors import (
    PayloadTooLargeError as PayloadTooLargeError,
)
from squidstep_redis.errors import (
    RunCancelledError as RunCancelledError,
)
from squidstep_redis.errors import (
    RunDeletedError as RunDeletedError,
)
from squidstep_redis.errors import (
    RunExistsError as RunExistsError,
)
from squidstep_redis.errors import (
    SquidstepError as SquidstepError,
)
from squidstep_redis.errors import (
    StaleStepRunError as StaleStepRunError,
)
from squidstep_redis.errors import (
    StepBusyError as StepBusyError,
)
from squidstep_redis.errors import (
    StepDelayedError as StepDelayedError,
)
from squidstep_redis.errors import (
    StepExhaustedError as StepExhaustedError,
)
from squidstep_redis.errors import (
    StepFailedError as StepFailedError,
)
from squidstep_redis.errors import (
    StepRunNotFoundError as StepRunNotFoundError,
)
from squidstep_redis.errors import (
    UndecodablePayloadError as UndecodablePayloadError,
)
from squidstep_redis.errors import (
    UnsupportedClientError as UnsupportedClientError,
)
from squidstep_redis.errors import (
    WaitTimeoutError as WaitTimeoutError,
)
from squidstep_redis.explanations import (
    Action as Action,
)
from squidstep_redis.explanations import (
    RunExplanation as RunExplanation,
)
from squidstep_redis.explanations import (
    StepExplanation as StepExplanation,
)
from squidstep_redis.functions.runs import (
    AsyncRun as AsyncRun,
)
from squidstep_redis.functions.runs import (
    Run as Run,
)
from squidstep_redis.model import (
    Attempt as Attempt,
)
from squidstep_redis.model import (
    BeginResult as BeginResult,
)
from squidstep_redis.model import (
    Outcome as Outcome,
)
from squidstep_redis.model import (
    ScheduleResult as ScheduleResult,
)
from squidstep_redis.model import (
    StepRun as StepRun,
)
from squidstep_redis.model import (
    StepStatus as StepStatus,
)
from squidstep_redis.operations.calls import (
    Calls as Calls,
)
from squidstep_redis.protocol.call import (
    Call as Call,
)
from squidstep_redis.protocol.codec import (
    Codec as Codec,
)
from squidstep_redis.protocol.codec import (
    MsgpackCodec as MsgpackCodec,
)
from squidstep_redis.protocol.codec import (
    Place as Place,
)
from squidstep_redis.protocol.codec import (
    PlacedCodec as PlacedCodec,
)
from squidstep_redis.protocol.pipeline import (
    Queued as Queued,
)
from squidstep_redis.server_errors import (
    BatchError as BatchError,
)
from squidstep_redis.server_errors import (
    NotReplicatedError as NotReplicatedError,
)
from squidstep_redis.server_errors import (
    NotSentError as NotSentError,
)
from squidstep_redis.server_errors import (
    OutcomeUnknownError as OutcomeUnknownError,
)
from squidstep_redis.server_errors import (
    RefusedError as RefusedError,
)
from squidstep_redis.server_errors import (
    ReplyMismatchError as ReplyMismatchError,
)
from squidstep_redis.server_errors import (
    ServerError as ServerError,
)
from squidstep_redis.settings import (
    StoreSettings as StoreSettings,
)
from squidstep_redis.store import (
    StepRunStore as StepRunStore,
)
from squidstep_redis.summaries import (
    ClaimCounts as ClaimCounts,
)
from squidstep_redis.summaries import (
    RunPage as RunPage,
)
from squidstep_redis.summaries import (
    RunSummary as RunSummary,
)
from squidstep_redis.summaries import (
    StepPage as StepPage,
)
from squidstep_redis.summaries import (
    StepRunList as StepRunList,
)
from squidstep_redis.summaries import (
    StoreOverview as StoreOverview,
)
from squidstep_redis.transport.events import (
    Event as Event,
)
