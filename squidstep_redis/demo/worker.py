"""The workers' side of a demo: sends events to the parent, and exits with it."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any, Final, Literal, NamedTuple

Kind = Literal["ready", "delivered", "started", "finished", "completed", "skipped", "busy", "failed"]


class Event(NamedTuple):
    """An event that a worker sends.

    Pickled, it is shorter than the smallest PIPE_BUF that POSIX allows, so that it is sent in one atomic write.
    """

    kind: Kind  # "started" and "finished" refer to the work of a step, later kinds to its claim
    worker: int  # its index
    pid: int  # of the sender: the worker, or a process that it forked
    file: int = 0  # its index
    step: str = ""  # empty if the event is about all steps of the file
    attempt: int = 0  # of "started"
    retry_in: float = 0.0  # of "busy": the seconds until the claim's lease expires


class Pipes(NamedTuple):
    """The pipes that all workers and their forked processes share."""

    events: Connection[Event, Any]  # the parent reads EOF when the last of the processes has exited
    lifeline: Connection[Any, Any]  # EOF when the parent closes it or exits
    gate: Connection[Any, Any]  # EOF when the parent lets a stalled process continue


class Parent:
    """The worker's interface to the parent process."""

    worker: int
    pipes: Pipes

    def send_event(self, kind: Kind, file: int = 0, step: str = "", **details: Any) -> None:
        """Sends an event to the parent; the arguments are the fields of `Event`."""
        self.pipes.events.send(Event(kind, self.worker, os.getpid(), file, step, **details))

    def stall(self, *, at_gate: bool) -> None:
        """Blocks until this process is killed, or, with `at_gate`, until the parent closes the gate."""
        if at_gate:
            os.read(self.pipes.gate.fileno(), 1)
        while not at_gate:
            signal.pause()


parent: Final = Parent()
"""The parent of this worker process."""


def set_up_worker(worker: int, pipes: Pipes) -> None:
    """Prepares the process of the worker with this index."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; only the parent handles it
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    parent.worker, parent.pipes = worker, pipes
    exit_with_parent()


def exit_with_parent() -> None:
    """Makes this process, and each process that it forks, exit when the parent closes the lifeline or exits."""

    def wait() -> None:
        os.read(parent.pipes.lifeline.fileno(), 1)
        os._exit(1)

    def start_thread() -> None:
        # The thread blocks all signals, because RQ's alarms must reach the main thread.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        threading.Thread(target=wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    start_thread()
    os.register_at_fork(after_in_child=start_thread)
