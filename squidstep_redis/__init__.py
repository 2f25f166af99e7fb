"""Decides atomically in Redis which delivery of a step executes. Start at `StepRunStore` or `AsyncStepRunStore`.

`__init__.pyi` has the same names for type checkers; a test compares the two.
"""

from importlib import import_module

# The public names, by module. A module is imported when one of its names is first used: pytest loads this package's
# plugin in every project, and must not import redis-py with it.
_NAMES = {
    "aio": ("AsyncStepRunStore",),
    "claims.aio_claim": ("AsyncClaim",),
    "claims.claim": ("Claim",),
    "claims.failures": ("ExponentialBackoff", "PermanentError", "RetryLater"),
    "claims.request": ("ClaimSettings", "FunctionSettings", "StepSettings"),
    "claims.rules": ("current_claim",),
    "doctor.checks": ("Level",),
    "doctor.examine": ("Diagnosis", "Finding"),
    "errors": (
        "CorruptRunError",
        "InputMismatchError",
        "InvalidArgumentError",
        "NewerFormatError",
        "PayloadError",
        "PayloadTooLargeError",
        "RunCancelledError",
        "RunDeletedError",
        "RunExistsError",
        "SquidstepError",
        "StaleStepRunError",
        "StepBusyError",
        "StepDelayedError",
        "StepExhaustedError",
        "StepFailedError",
        "StepRunNotFoundError",
        "UndecodablePayloadError",
        "PayloadNotReadError",
        "UnsupportedClientError",
        "WaitTimeoutError",
    ),
    "explanations": ("Action", "RunExplanation", "StepExplanation"),
    "functions.runs": ("AsyncRun", "Run"),
    "model": (
        "Attempt",
        "BeginResult",
        "Outcome",
        "ScheduleResult",
        "StepRun",
        "StepStatus",
    ),
    "operations.calls": ("Calls",),
    "protocol.call": ("Call",),
    "protocol.codec": ("Codec", "MsgpackCodec", "Place", "PlacedCodec"),
    "protocol.pipeline": ("Queued",),
    "server_errors": (
        "BatchError",
        "NotReplicatedError",
        "NotSentError",
        "OutcomeUnknownError",
        "RefusedError",
        "ReplyMismatchError",
        "ServerError",
    ),
    "settings": ("StoreSettings",),
    "store": ("StepRunStore",),
    "summaries": ("ClaimCounts", "RunPage", "RunSummary", "StepPage", "StepRunList", "StoreOverview"),
    "transport.events": ("Event",),
}
_WITHOUT_REDIS = ("errors", "explanations", "model", "summaries")
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

globals()["__all__"] = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] not in _WITHOUT_REDIS:
        # It has import cycles: threads that import parts of it at the same time get some of them half initialized.
        import_module("redis")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
