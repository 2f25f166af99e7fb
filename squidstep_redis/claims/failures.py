"""What a failure of the work means for the next attempt: none, one after a delay, or one at once. No I/O."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NamedTuple, cast

from squidstep_redis.errors import InvalidArgumentError, add_note, described
from squidstep_redis.protocol.arguments import MAX_LEASE, Seconds, seconds

Permanent = type[BaseException] | tuple[type[BaseException], ...]
Backoff = Callable[[int], Seconds]


class PermanentError(Exception):
    """Raised by your code under a claim: the step has failed permanently, and no delivery executes it again.

    `retry_step` allows another attempt. It is recorded like any other exception, and raised again. It has the same
    effect in an exception group, which `asyncio.TaskGroup` raises.
    """


class RetryLater(Exception):  # noqa: N818 -- it is a request, not an error
    """Raised by your code under a claim: the attempt has failed, and the next one is to begin later.

    It has the same effect in an exception group. If a group has several, the longest delay counts.

    Attributes:
        retry_in: seconds until then.
    """

    retry_in: float = 0.0  # as class attributes, for subclasses that do not call __init__
    _message: str = ""

    def __init__(self, seconds: Seconds, message: str = "") -> None:
        """Makes the exception.

        Args:
            seconds: for how long no delivery can claim the step, by the server's clock: seconds, or a timedelta, from
                0.001.
            message: why, for operators.
        """
        super().__init__(seconds, message)
        self.retry_in = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        self._message = message

    def __str__(self) -> str:
        return self._message or f"retry in {self.retry_in:g} s"


@dataclass(frozen=True)
class ExponentialBackoff:
    """Delays that grow with each failed attempt: a value for `backoff=`.

    Attributes:
        first: delay after the first attempt, in seconds.
        cap: the longest delay, in seconds.
        factor: each delay is the previous one times this factor, from 1.
        jitter: the fraction by which each delay is varied at random, from 0 to 1, so that steps that failed together
            are not retried together.
    """

    first: float = 1.0
    cap: float = 300.0
    factor: float = 2.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError for a value out of its range."""
        seconds("first", self.first, MAX_LEASE)
        seconds("cap", self.cap, MAX_LEASE)
        if not _is_number(self.factor) or not self.factor >= 1:
            raise InvalidArgumentError("factor", f"must be at least 1, not {described(self.factor)}")
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise InvalidArgumentError("jitter", f"must be from 0 to 1, not {described(self.jitter)}")

    def __call__(self, attempt: int) -> float:
        """Returns the delay in seconds after an attempt, which is the first, the second, and so on."""
        try:
            delay = min(self.cap, self.first * self.factor ** (attempt - 1))
        except OverflowError:
            delay = self.cap
        return max(0.001, delay * random.uniform(1 - self.jitter, 1 + self.jitter))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Verdict(NamedTuple):
    """When a failed step can be claimed again.

    Attributes:
        final: never.
        retry_after: seconds from now; None: at once.
    """

    final: bool = False
    retry_after: float | None = None


AT_ONCE: Final = Verdict()
NEVER: Final = Verdict(final=True)


class FailureRules(NamedTuple):
    """The rules for one claim.

    Attributes:
        permanent: types of exceptions after which there is no further attempt, besides PermanentError.
        backoff: returns the delay after an attempt; None: there is none, except after RetryLater.
    """

    permanent: tuple[type[BaseException], ...] = ()
    backoff: Backoff | None = None

    def verdict(self, error: BaseException, attempt: int) -> Verdict:
        """Returns what an exception of the work means.

        Args:
            error: the exception. It receives a note if the delay is not valid, and the step can be claimed at once.
            attempt: number of attempts so far, including this one, but without those that do not count against
            `max_attempts`.
        """
        errors = _with_members(error)
        if any(isinstance(each, (PermanentError, *self.permanent)) for each in errors):
            return NEVER
        try:
            delays: list[Any] = [each.retry_in for each in errors if isinstance(each, RetryLater)]
            if delays:
                delay: Any = max(delays)
            elif self.backoff is not None and isinstance(error, Exception):
                delay = self.backoff(attempt)
            else:
                return AT_ONCE
            return Verdict(False, seconds("retry_after", delay, MAX_LEASE)) if delay else AT_ONCE
        except Exception as problem:  # noqa: BLE001 -- the failure itself must be recorded
            add_note(error, f"squidstep_redis ignored the delay: {type(problem).__name__}: {problem}")
            return AT_ONCE


def _with_members(error: BaseException) -> list[BaseException]:
    """Returns the exception, and those in it if it is a group: what one task of a group raises decides for all."""
    errors = [error]
    for each in errors:
        if isinstance(each, BaseExceptionGroup):
            errors += cast("BaseExceptionGroup[BaseException]", each).exceptions
    return errors


_NO_RULES: Final = FailureRules()


def failure_rules(permanent: Permanent, backoff: Backoff | None) -> FailureRules:
    """Returns the rules for the arguments of `run_step`; raises InvalidArgumentError if one is rejected."""
    if permanent == () and backoff is None:
        return _NO_RULES
    types = cast("tuple[object, ...]", permanent if isinstance(permanent, tuple) else (permanent,))
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in types):
        raise InvalidArgumentError(
            "permanent", f"must be a type of exception, or a tuple of them, not {described(permanent)}"
        )
    if backoff is not None and not callable(backoff):
        raise InvalidArgumentError("backoff", f"must be a function of the attempt, not {described(backoff)}")
    return FailureRules(cast("tuple[type[BaseException], ...]", types), backoff)
