"""The start of a demo's worker processes, in the middle of which no signal may do harm."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.context import SpawnContext
from typing import Final

HELD_BACK: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_held_back() -> Generator[SpawnContext]:
    """A block to start a worker in and take note of it: no Ctrl-C meets the one half imported, or the other half done.

    What was held back arrives at its end. The process starts with the signals masked: see `take_signals`.

    Yields:
        What starts processes that have nothing of this one but what they are given.
    """
    # The tracker that multiprocessing starts along with the first worker would let the signals in: it goes before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    # The mask is for the worker, which inherits it. It holds back this thread alone: another may take the signal.
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in HELD_BACK}
    for number in HELD_BACK:
        if callable(handlers[number]):
            signal.signal(number, lambda number, _frame: arrived.append(number))
    try:
        yield get_context("spawn")
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in arrived:
            signal.raise_signal(number)


def take_signals() -> None:
    """In the started process: takes signals again, but for the terminal's Ctrl-C, which is for the parent alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
