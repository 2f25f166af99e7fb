"""The names of Celery that this package uses, imported only if Celery is installed and new enough.

The other modules import Celery from here, so that the version is checked first, in any order of imports. Celery has no
type stubs: the protocols describe the parts that are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NoReturn, Protocol, cast

try:
    installed = version("celery")
except PackageNotFoundError as missing:
    raise ImportError("squidstep_redis.celery needs Celery: pip install 'squidstep_redis[celery]'") from missing
if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < (OLDEST := (5, 3)):
    raise ImportError(
        f"squidstep_redis.celery needs Celery 5.3 or later; Celery {installed} is installed: "
        "pip install --upgrade 'squidstep_redis[celery]'"
    )

import celery
from celery import exceptions, signals


class App(Protocol):
    """An application."""

    @property
    def conf(self) -> Any:
        """Its configuration."""
        ...


class Request(Protocol):
    """One delivery of a task: `Task.request`.

    Attributes:
        id: the task id.
        is_eager: whether `apply` executes the task, or `task_always_eager`.
        called_directly: whether `Task.retry` raises its error and sends nothing.
        retries: how often the task was retried.
        headers: further headers of the message, which each retry passes on; None: there are none.
        properties: properties of the message; None: it came from no broker.
    """

    id: str
    is_eager: bool
    called_directly: bool
    retries: int
    headers: dict[str, Any] | None
    properties: dict[str, Any] | None


class Task(Protocol):
    """A task.

    Attributes:
        run: the function of the task.
    """

    run: Callable[..., Any]

    @property
    def app(self) -> App:
        """The application of the task."""
        ...

    @property
    def request(self) -> Request:
        """The current delivery."""
        ...

    def signature_from_request(
        self, request: Request, *, countdown: float, retries: int, headers: dict[str, Any]
    ) -> Any:
        """Returns the call that delivers the task again."""
        ...


PREDICATES: Final[tuple[type[Exception], ...]] = (exceptions.Ignore, exceptions.Reject, exceptions.Retry)
"""Exceptions that inform Celery that a task has neither succeeded nor failed."""


def on_process_start(function: Callable[..., None]) -> None:
    """Calls a function in each child that the prefork pool forks.

    Args:
        function: accepts any keyword arguments.
    """
    signal: Any = signals.worker_process_init
    signal.connect(function, weak=False)


def current_app() -> App:
    """Returns the current application."""
    return cast("App", celery.current_app)


def current_task() -> Task | None:
    """Returns the task that a worker or `apply` is executing in this thread; None: there is none.

    A task that is called in the function of another one, like a function, is part of the other one.
    """
    app: Any = celery.current_app
    return cast("Task | None", app.current_worker_task)


def send_again(task: Task, error: Exception, countdown: float, headers: dict[str, Any]) -> NoReturn:
    """Sends the current task again, and raises Retry. It uses none of the task's own retries.

    Args:
        task: the current task.
        error: the reason; Celery stores it with the state RETRY.
        countdown: seconds until the next delivery.
        headers: further headers of the message.

    Raises:
        Retry: the task was sent.
        Reject: the task could not be sent. The broker redelivers the message if it is not acknowledged yet.
    """
    make_retry, request = cast("Callable[..., Exception]", exceptions.Retry), task.request
    signature = task.signature_from_request(request, countdown=countdown, retries=request.retries, headers=headers)
    try:
        signature.apply_async()
    except Exception as problem:  # noqa: BLE001 -- whatever the reason, the broker must redeliver the message
        raise exceptions.Reject(problem, requeue=True) from error
    raise make_retry(exc=error, when=countdown, sig=signature) from error
