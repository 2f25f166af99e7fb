"""What `squidstep demo rq` has RQ do: the job, the worker, and what they tell the parent, apart from store and RQ.

RQ's processes fork others, and some outlive the one that forked them. Three pipes reach all of them alike, for each
is inherited: `reports` leads to the parent, which sees its end when the last of them is gone; `line` has its end when
the parent lets go, or is gone; and at the `gate`, until its end, waits the one horse that outlives its worker.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, Literal, NamedTuple

from redis import Redis
from rq import Worker
from rq.job import Job

from squidstep_redis import StepBusyError, current_claim
from squidstep_redis.demo.process import take_signals
from squidstep_redis.demo.work import EFFECTS, Payload, execute
from squidstep_redis.rq import configure, current_run, release_killed_work_horse, steps

LEASE: Final = 2.0
GIVEN_UP_AFTER: Final = 2  # seconds without a word from its worker, and RQ takes a job for abandoned

Fate = Literal["horse", "worker", "worker and horse"]
"""What is killed inside a step. A horse whose worker alone is killed lives on."""


Kind = Literal["ready", "delivered", "began", "ended", "completed", "skipped", "busy", "returned"]


class Report(NamedTuple):
    """What is told. Pickled, it is shorter than any system's PIPE_BUF: one write, which no other tears."""

    kind: Kind
    worker: str
    horse: int
    number: int = -1
    step: str = ""
    attempt: int = 0


class Pipes(NamedTuple):
    """The workers' ends."""

    reports: Connection[Report, Any]
    line: Connection[Any, Any]
    gate: Connection[Any, Any]


class _Teller:
    """Tells the parent, from within a worker and its horses."""

    pipes: Pipes
    worker: str

    def tell(self, kind: Kind, number: int = -1, step: str = "", attempt: int = 0) -> None:
        self.pipes.reports.send(Report(kind, self.worker, os.getpid(), number, step, attempt))

    def stand_still(self, fate: Fate) -> None:
        """Until this horse is killed; or, of a worker to be killed alone, may go on."""
        if fate == "worker":
            os.read(self.pipes.gate.fileno(), 1)
            return
        while True:
            signal.pause()

    def hang_on(self) -> None:
        """Ends this process at the end of the line, and likewise each that it forks."""
        self._events()
        os.register_at_fork(after_in_child=self._events)

    def _events(self) -> None:
        def watch() -> None:
            os.read(self.pipes.line.fileno(), 1)
            os._exit(1)

        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # RQ's alarms are not for this thread
        threading.Thread(target=watch, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_parent: Final = _Teller()


# The job


@steps(run_id="{run_id}", lease=LEASE)
def work_on(number: int, run_id: str, path: str, fates: dict[str, Fate]) -> Payload:
    """The job: one file's three steps.

    Args:
        number: of the file, as short as reports are.
        run_id: of the file.
        path: likewise.
        fates: what is killed inside which step, when it begins for the first time.

    Returns:
        What all steps gave.
    """
    del run_id  # it is for `steps`
    _parent.tell("delivered", number)
    known: Payload = {"path": path}
    for step in EFFECTS:
        effects: list[str] = []
        try:
            effect = partial(_effect, effects, number, step, fates.get(step))
            known = {**known, **current_run().call(step, effect, known)}
        except StepBusyError:
            _parent.tell("busy", number, step)
            raise
        _parent.tell("completed" if effects else "skipped", number, step)
    _parent.tell("returned", number)
    del known["path"]
    return known


def _effect(effects: list[str], number: int, step: str, fate: Fate | None, known: Payload) -> Payload:
    claim = current_claim()
    attempt = claim.step_run.attempt if claim is not None else 0
    _parent.tell("began", number, step, attempt)
    if fate is not None and attempt == 1:
        _parent.stand_still(fate)
    output = execute(step, known)
    effects.append(step)
    _parent.tell("ended", number, step)
    return output


# The worker


class _Worker(Worker):
    """RQ's own, but that its jobs count as abandoned after seconds, and not minutes."""

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:  # noqa: ARG002 -- RQ's signature
        return GIVEN_UP_AFTER


def work(worker: str, queue: str, settings: Payload, pipes: Pipes) -> None:
    """A worker process: RQ's worker and scheduler, until it is killed, or the line ends."""
    take_signals()
    logging.disable()  # the parent says what happens
    _parent.worker, _parent.pipes = worker, pipes
    _parent.hang_on()
    multiprocessing.set_start_method("fork", force=True)  # of RQ 2's scheduler: what is not forked does not hang on
    client: Any = Redis  # redis-py leaves parts of its types unknown
    configure(settings["url"], **{name: settings[name] for name in settings if name != "url"})
    rq = _Worker(
        [queue],
        name=f"{queue}-{worker}",
        connection=client.from_url(settings["url"]),
        maintenance_interval=1,
        worker_ttl=16,  # RQ takes 15 off: so long it waits for a job before it looks after those abandoned
        job_monitoring_interval=1,
        work_horse_killed_handler=release_killed_work_horse,
    )
    _parent.tell("ready")
    rq.work(with_scheduler=True)
