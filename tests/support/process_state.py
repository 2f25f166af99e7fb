"""Settings of the process that workers of RQ and Celery change: left over, they change the tests that run later."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

from squidstep_redis import signals

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE")  # pytest-timeout sets SIGALRM
_LOGGERS = ("", "squidstep_redis")


class ProcessState(NamedTuple):
    """What `restored` restores.

    Attributes:
        signal_handlers: by the signal's name.
        also_deferred: the signal that is deferred in addition to SIGALRM.
        log_handlers: by the logger's name.
        log_levels: by the logger's name.
    """

    signal_handlers: dict[str, Any]
    also_deferred: int | None
    log_handlers: dict[str, list[logging.Handler]]
    log_levels: dict[str, int]


def process_state() -> ProcessState:
    """Returns the settings as they are."""
    loggers = {name: logging.getLogger(name) for name in _LOGGERS}
    return ProcessState(
        {name: signal.getsignal(getattr(signal, name)) for name in _SIGNALS},
        signals._also_deferred,
        {name: logger.handlers[:] for name, logger in loggers.items()},
        {name: logger.level for name, logger in loggers.items()},
    )


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restores the settings after the block, in which a worker runs in this process."""
    before = process_state()
    try:
        yield
    finally:
        for name, handler in before.signal_handlers.items():
            signal.signal(getattr(signal, name), handler)
        signals.also_defer(before.also_deferred)
        for name in _LOGGERS:
            logging.getLogger(name).handlers[:] = before.log_handlers[name]
            logging.getLogger(name).setLevel(before.log_levels[name])
