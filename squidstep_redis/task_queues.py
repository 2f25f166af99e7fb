"""Code that the RQ and Celery integrations share: stores of worker processes, owners of claims, delays of reruns."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, Final, Self, TypedDict, TypeVar, cast
from uuid import UUID

from redis import Redis

from squidstep_redis import Call, InvalidArgumentError, RetryLater, StepBusyError, StepDelayedError, StepRunStore
from squidstep_redis.claims.request import DEFAULT_LEASE, default_owner
from squidstep_redis.escaping import without_controls
from squidstep_redis.functions.checks import check_accepts
from squidstep_redis.protocol.arguments import MAX_LEASE, Seconds, seconds
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.transport.blocking import BlockingTransport

T = TypeVar("T")

NotNow = StepBusyError | StepDelayedError | RetryLater
NOT_NOW: Final = (StepBusyError, StepDelayedError, RetryLater)
"""Why a step is not executed now, but later."""

_MAX_OWNER_BYTES: Final = 256
_MAX_DOUBLINGS: Final = 32  # 2**32 seconds are longer than any lease


class _QueueTransport(BlockingTransport):
    """A transport whose calls are not interrupted by the timeout of a job or task."""

    @classmethod
    def of(cls, transport: BlockingTransport) -> Self:
        """Returns a transport that shares everything with another one."""
        shared = cls.__new__(cls)
        vars(shared).update(vars(transport))
        return shared

    def send(self, call: Call[T]) -> T:
        with defer_sigalrm():
            return super().send(call)

    def send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        with defer_sigalrm():
            return super().send_batch(calls)


class QueueStore(StepRunStore):
    """A store whose calls are not interrupted by the timeout of a job or task."""

    _transport_type = _QueueTransport

    @staticmethod
    def adopt(store: StepRunStore) -> None:
        """Keeps the timeout of a job or task from interrupting the calls of a store, which is otherwise unchanged.

        Args:
            store: the store.
        """
        if not isinstance(store._transport, _QueueTransport):
            store._transport = _QueueTransport.of(store._transport)


class ProcessStores:
    """The stores of this process. A forked child creates its own, unless the store itself was configured."""

    def __init__(self) -> None:
        self._connect: str | Callable[[], Any] | None = os.environ.get("SQUIDSTEP_REDIS_URL")
        self._store: StepRunStore | None = None
        self.settings: dict[str, Any] = {}
        self.discard()
        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=self.discard)

    def discard(self) -> None:
        """Discards the stores: the next call creates them again."""
        self._made: dict[str | Callable[[], Any], StepRunStore] = {}

    def configure(
        self, connect: str | Callable[[], Any] | None, store: StepRunStore | None, settings: dict[str, Any]
    ) -> None:
        """Sets the server and the settings, or the store, and discards the existing stores.

        Args:
            connect: a URL, or a function that returns a client, which is called once in each process; None: `store` is
                given.
            store: the store to use as it is; None: `connect` is given.
            settings: keyword arguments of the store; none if it is given.

        Raises:
            InvalidArgumentError: both or neither of `connect` and `store` are given, or `store` and settings, or
                `store` is not a StepRunStore, or `connect` or a setting is rejected.
            TypeError: there is no such setting.
        """
        if store is not None:
            if not isinstance(cast("object", store), StepRunStore):
                raise InvalidArgumentError(
                    "store",
                    f"must be a StepRunStore, not of type {type(store).__name__}: coroutines use a blocking one, too",
                )
            if connect is not None or settings:
                raise InvalidArgumentError("store", "is used as it is: pass no URL, function or settings with it")
            QueueStore.adopt(store)
        elif isinstance(connect, str):
            QueueStore.from_url(connect, **settings)  # raises what each job would raise; opens no connection
        else:
            _check_function(connect)
            QueueStore(Redis(socket_timeout=None), **settings)  # raises what is wrong with the settings
        self._connect, self._store, self.settings = connect, store, settings
        self.discard()

    def configured(self) -> StepRunStore | None:
        """Returns the configured store, or one on the configured server; None if neither is configured."""
        connect = self._connect
        if self._store is not None or connect is None:
            return self._store
        # Threads may make their first stores at the same time: `setdefault` is atomic, and one of them is used.
        return self._made.get(connect) or self._made.setdefault(connect, self._make(connect))

    def _make(self, connect: str | Callable[[], Any]) -> StepRunStore:
        if isinstance(connect, str):
            return QueueStore.from_url(connect, **self.settings)
        return QueueStore(connect(), **self.settings)


def _check_function(connect: Callable[[], Any] | None) -> None:
    if connect is None:
        raise InvalidArgumentError("connect", "must be a URL, or a function that returns a client; or pass a store")
    if not callable(connect):  # the repr of a client may contain a password
        problem = f"must be a URL, or a function that returns a client, not of type {type(connect).__name__}"
        raise InvalidArgumentError("connect", f"{problem}: each process needs its own client")
    check_accepts("connect", connect)


def owner_of(execution: str | None, pid: int | None = None) -> str:
    """Returns the owner of claims: `host:pid execution`. The execution distinguishes jobs if a pid is reused.

    Args:
        execution: the id of the job or task that claims the step; None: there is none, and the owner is `host:pid`.
        pid: the process that claims the step; None: this process.
    """
    text = default_owner() if pid is None else f"{default_owner().rpartition(':')[0]}:{pid}"
    if execution is not None:
        text = without_controls(f"{text} {execution}")
    return text.encode(errors="replace")[:_MAX_OWNER_BYTES].decode(errors="ignore")


def is_uuid4(text: str) -> bool:
    """Returns whether a text is a random UUID: an id that RQ, Celery or a broker has generated.

    Args:
        text: the text.
    """
    try:
        return UUID(text).version == 4
    except ValueError:
        return False


def is_wrapped_by(function: object, decorated: object) -> bool:
    """Returns whether a function is the decorated function, or wraps it with `functools.wraps`.

    Args:
        function: the function, or a method.
        decorated: the decorated function.
    """
    while function is not None:
        function = getattr(function, "__func__", function)
        if function is decorated:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


class BusyNotes(TypedDict, total=False):
    """What a job or task remembers of the claim that made it wait, from one delivery to the next one.

    Attributes:
        claim: the claim that made it wait.
        looks: how many times it has found that claim.
    """

    claim: str
    looks: int


def rerun(error: NotNow, lease: Seconds | None, before: BusyNotes) -> tuple[int, BusyNotes]:
    """Returns the seconds until the rerun of a job or task, and what it must remember.

    Args:
        error: why the step was not executed, or must be retried.
        lease: seconds to use if the other worker's claim has no lease.
        before: the notes of the previous delivery.
    """
    if not isinstance(error, StepBusyError):
        return reschedule_delay(error, lease), {}
    claim = f"{error.current.id} {error.current.attempt}"
    looks = before.get("looks", 0) if before.get("claim") == claim else 0
    return reschedule_delay(error, lease, looks), {"claim": claim, "looks": looks + 1}


def reschedule_delay(error: NotNow, lease: Seconds | None, looks: int | None = None) -> int:
    """Returns the seconds until the rerun, at least 1, plus jitter of up to 10 %. RQ accepts whole seconds only.

    Args:
        error: why the step was not executed, or must be retried, with the remaining lease or delay.
        lease: seconds to use if the other worker's claim has no lease; None: the default lease.
        looks: how many times the execution has found this claim before: it tries again after 1, 2, 4, … seconds, and
            at the end of the lease; None: at the end of the lease or delay.
    """
    rest = _delay_of(error) if isinstance(error, RetryLater) else error.retry_in
    if rest is None:
        rest = lease if isinstance(lease, float | int) else DEFAULT_LEASE if lease is None else lease.total_seconds()
    delay = max(1, math.ceil(rest))
    if looks is not None and 2 ** min(looks, _MAX_DOUBLINGS) < delay:
        delay = 2**looks
        return delay + random.randint(0, delay // 10)
    return delay + random.randint(0, max(1, delay // 10))


def _delay_of(error: RetryLater) -> float:
    """Returns the delay; 0 for an invalid delay, so that the step can be claimed at once."""
    try:
        return seconds("retry_in", error.retry_in, MAX_LEASE)
    except InvalidArgumentError:
        return 0.0
