"""Real RQ workers in separate processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import redis
import rq
import rq.scheduler
import rq.worker

from support.processes import is_alive

DEADLINE: Final = 60.0  # seconds for which a test waits for a process

# The workers fork from a process that has one thread and has already imported the slow modules.
_processes: Any = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["__main__", "asyncio", "rq", "squidstep_redis.rq"])

WORKERS: Final[dict[str, Any]] = {"Worker": rq.Worker, "SimpleWorker": rq.SimpleWorker}
if hasattr(rq.worker, "SpawnWorker"):
    WORKERS["SpawnWorker"] = rq.worker.SpawnWorker


def start_process(
    kind: str, url: str, queue: str, log: Path, environment: Mapping[str, str], options: dict[str, Any]
) -> Any:
    """Starts a process that runs a worker.

    Args:
        kind: a key of `WORKERS`.
        url: of the server.
        queue: the name of the queue.
        log: a file for the output of the worker and of all its children.
        environment: variables to set in the worker.
        options: keyword arguments of the worker, and `with_scheduler` and `burst` for its `work()`.
    """
    process = _processes.Process(target=_work, args=(kind, url, queue, log, environment, options))
    process.start()
    return process


def _work(kind: str, url: str, queue: str, log: Path, environment: Mapping[str, str], options: dict[str, Any]) -> None:
    os.setsid()  # the session identifies all children of the worker
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # for RQ's scheduler; this process has another method
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(sys.path))  # a spawned horse knows no other path
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    # RQ's scheduler looks for due jobs once a second and accepts whole seconds only.
    vars(rq.scheduler)["time"] = SimpleNamespace(sleep=lambda _: time.sleep(0.05))
    work_options = {name: options.pop(name) for name in ("with_scheduler", "burst")}
    WORKERS[kind]([queue], connection=redis.Redis.from_url(url), **options).work(**work_options)


def _exit_with(parent: Any) -> None:
    """Kills the worker and all its children when the test process has died."""
    parent.join()
    _kill_sessions({os.getsid(0)})


def _kill_sessions(sessions: Collection[int]) -> None:
    while pids := _members(sessions):
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # this process last
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _members(sessions: Collection[int]) -> list[int]:
    """Returns the processes of these sessions that are alive."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if _is_member(pid, sessions)]


def _is_member(pid: int, sessions: Collection[int]) -> bool:
    try:
        return os.getsid(pid) in sessions and is_alive(pid)
    except ProcessLookupError:
        return False


class WorkerProcess:
    """A worker with its scheduler and its work-horses.

    Attributes:
        supervised: whether the worker is restarted when it quits.
    """

    def __init__(self, start: Callable[[], Any], *, supervised: bool) -> None:
        self._start = start
        self._sessions: list[int] = []
        self.supervised = supervised
        self.start()

    def start(self) -> None:
        self._process = self._start()
        self._sessions.append(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """Kills the worker alone, by SIGKILL; its work-horse and its scheduler keep running."""
        self.supervised = False
        self._process.kill()
        self.wait_dead()

    def wait_dead(self) -> None:
        """Waits until the worker is dead; its children may still run."""
        self._process.join(DEADLINE)
        assert not self.is_alive()

    def kill_all(self) -> None:
        """Kills the worker and all its children."""
        self.supervised = False
        _kill_sessions(self._sessions)
        self._process.kill()  # it may not have created its session yet
        self._process.join(DEADLINE)
        self._process.close()
