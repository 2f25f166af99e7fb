"""Real Celery workers, and control over the checkpoints, the effects and the redeliveries of their tasks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import redis
from celery.result import AsyncResult
from kombu import Connection

from squidstep_redis import StepRunStore
from support import celery_app
from support.processes import is_alive

DEADLINE: Final = 200.0  # seconds for which a test waits
LONG_AGO: Final = 1.0  # seconds since 1970
TESTS: Final = Path(__file__).parents[1]


class CeleryWorker:
    """A worker in processes of its own, which end with this process at the latest.

    Args:
        url: of the broker.
        pool: a name that `celery worker --pool` accepts.
        log: the file that receives the output.
        environment: further variables of its environment.
    """

    def __init__(self, url: str, pool: str, log: Path, **environment: str) -> None:
        self._url, self._pool, self._environment = url, pool, environment
        self._log = log.open("wb")
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "support.celery_app", "worker", "--loglevel=info"),
                *("--queues=steps", f"--hostname={self._pool}@%h", f"--pool={self._pool}", "--concurrency=4"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            ],
            env={
                **os.environ,
                "CELERY_TESTS_URL": self._url,
                "CELERY_TESTS_PARENT": str(os.getpid()),
                "PYTHONPATH": os.pathsep.join(sys.path),
                **self._environment,
            },
            cwd=TESTS,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Kills the worker alone, by SIGKILL."""
        self._process.kill()
        self._process.wait(DEADLINE)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the worker alone."""
        self._process.send_signal(number)

    def wait(self) -> None:
        """Waits until the worker has ended."""
        self._process.wait(DEADLINE)

    def has_logged(self, text: str) -> bool:
        return text in Path(self._log.name).read_text("utf-8")

    def close(self) -> None:
        """Kills the worker and its children, by SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(DEADLINE)
        self._log.close()


class Harness:
    """The broker of the workers.

    Attributes:
        url: of the server, which is broker, result backend, and the store of the steps.
        connection: a client.
        store: the store of the steps.
        number: what distinguishes the tasks and effects of one test from those of the others, which may come late. Each
            test has a thousand numbers.
    """

    number = 0

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = redis.Redis.from_url(url, decode_responses=True, socket_timeout=2 * DEADLINE)
        self.store = StepRunStore.from_url(url)
        celery_app.app.conf.update(broker_url=url, result_backend=url)
        # The visibility timeout is that of the workers.
        self._broker: Any = Connection(url, transport_options=celery_app.app.conf.broker_transport_options)
        self._channel = self._broker.channel()

    def close(self) -> None:
        self._broker.close()
        self.store.close()
        self.connection.close()

    def _pop(self, key: str) -> str:
        found: Any = self.connection.blpop([key], timeout=int(DEADLINE))
        assert found is not None, f"nothing came to {key!r} within {DEADLINE} seconds"
        return str(found[1])

    def until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"{condition} did not hold within {DEADLINE} seconds"
            time.sleep(0.01)

    def wait_ready(self) -> None:
        self._pop("ready")

    def reached(self, checkpoint: str) -> int:
        """Waits for the next task that reaches the checkpoint, and returns its process."""
        return int(self._pop(f"reached {checkpoint}"))

    def resume(self, checkpoint: str) -> None:
        """Resumes one task that waits at the checkpoint."""
        self.connection.rpush(f"resume {checkpoint}", 1)

    def ended(self, result: AsyncResult[Any] | str) -> tuple[str, Any]:
        """Waits for the end of the next delivery of a task, and returns its state and result."""
        state, value = json.loads(self._pop(f"ended {getattr(result, 'id', result)}"))
        return state, value

    def results(self, result: AsyncResult[Any] | str, times: int) -> list[Any]:
        """Waits until this many deliveries of a task have ended with a result, and returns the results."""
        found: list[Any] = []
        while len(found) < times:
            state, value = self.ended(result)
            assert state in ("SUCCESS", "RETRY", None), value  # None: interrupted
            if state == "SUCCESS":
                found.append(value)
        return found

    def kill(self, pid: int) -> None:
        """Kills a process, by SIGKILL, and waits until it is dead; its claims expire."""
        os.kill(pid, signal.SIGKILL)
        self.wait_dead(pid)

    def wait_dead(self, pid: int) -> None:
        """Waits until a process is dead, and lets the leases of all claims expire."""
        self.until(lambda: not is_alive(pid))
        for claim in self.store.live_claims():
            self.store.expire_claim(claim)

    def redeliver(self, task: AsyncResult[Any]) -> None:
        """Lets Celery redeliver a task, as if its visibility timeout had passed.

        The time of the delivery is set back. Then Celery looks for such tasks; while a worker does so, it does nothing.
        A task that was rejected in the meantime is redelivered already.
        """
        unacked: Any = self.connection.hgetall("unacked")
        tags = [tag for tag, message in unacked.items() if json.loads(message)[0]["headers"]["id"] == task.id]
        for tag in tags:
            self.connection.zadd("unacked_index", {tag: LONG_AGO}, xx=True)

        def is_redelivered() -> bool:
            self._channel.qos.restore_visible(num=1_000, interval=1)
            return all(self.connection.zscore("unacked_index", tag) != LONG_AGO for tag in tags)

        self.until(is_redelivered)

    def is_in_broker(self, task_id: str) -> bool:
        """Whether the broker has a message of a task: in the queue, or delivered and not acknowledged."""
        queued: Any = self.connection.lrange("steps", 0, -1)
        unacked: Any = self.connection.hvals("unacked")
        return any(task_id in message for message in [*queued, *unacked])

    def effects(self) -> Counter[str]:
        """Returns how often each effect of this test has happened."""
        found: Any = self.connection.lrange(f"effects {self.number // 1000}", 0, -1)
        return Counter(found)

    def outcomes(self, run_id: str, step: str) -> list[str]:
        """Returns how each attempt of a step has ended."""
        return [str(attempt.outcome) for attempt in self.store.attempts(run_id, step)]
