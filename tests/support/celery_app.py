"""The application of the Celery workers in the tests, and its tasks. Tasks and tests meet at lists on the broker."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import Any, Final

import redis
from celery import Celery, Task, shared_task, signals
from celery.exceptions import Ignore, Reject

from squidstep_redis import PermanentError, RetryLater, current_claim
from squidstep_redis.celery import current_run, step, steps

URL: Final = os.environ.get("CELERY_TESTS_URL", "memory://")
PARENT: Final = int(os.environ.get("CELERY_TESTS_PARENT", "0"))
# Seconds. Workers must not redeliver on their own, as they would do after each ten idle polls (gevent), or every 100
# seconds: the duplicate of a paused task is paused, too, and occupies its place until DEADLINE. See Harness.redeliver.
VISIBILITY_TIMEOUT: Final = 3_600
DEADLINE: Final = 200  # seconds for which a task waits to be resumed

app: Any = Celery("celery_app", broker=URL, backend=URL if URL != "memory://" else "cache+memory://")
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_default_queue="steps",
    worker_prefetch_multiplier=8,  # gevent and threads get no more for two seconds when all places are taken
    # A worker that is killed while it looks for messages to redeliver keeps the others from it, by default for minutes.
    broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT, "unacked_mutex_expire": 1},
    broker_connection_retry_on_startup=True,
)
_clients: dict[int, Any] = {}


def client() -> Any:
    """Returns this process's client of the server where tasks and tests meet."""
    if os.getpid() not in _clients:
        _clients[os.getpid()] = redis.Redis.from_url(URL, decode_responses=True, socket_timeout=2 * DEADLINE)
    return _clients[os.getpid()]


def effect(name: str, number: int) -> None:
    """Records an effect. The number tells the tests apart: each has a thousand of its own."""
    client().rpush(f"effects {number // 1000}", name)


def pause(checkpoint: str) -> None:
    """Waits at the checkpoint until the test resumes the task."""
    client().rpush(f"reached {checkpoint}", os.getpid())
    # Python runs no signal handler until a call of the system ends that began just after the signal arrived.
    for _ in range(DEADLINE):
        if client().blpop([f"resume {checkpoint}"], timeout=1):
            return


@signals.worker_ready.connect(weak=False)
def report_ready(**_: Any) -> None:
    client().rpush("ready", os.getpid())
    if PARENT:
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    while os.getppid() == PARENT:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


@signals.task_postrun.connect(weak=False)
def report_end(task_id: str, state: str, retval: Any, **_: Any) -> None:
    """Reports the end of each delivery, except of those that the tests run in their own process."""
    if PARENT:
        client().rpush(f"ended {task_id}", json.dumps([state, retval], default=repr))


def this_attempt() -> int:
    claim = current_claim()
    assert claim is not None
    return claim.step_run.attempt


# Tasks of one step


@app.task
@step("charge", lease=60)
def charge(amount: int) -> dict[str, int]:
    """Pauses before its effect."""
    pause(f"charging {amount}")
    effect("charge", amount)
    return {"charged": amount}


@app.task
@step("charge", lease=60)
def charge_unless_killed(amount: int) -> dict[str, int]:
    """Pauses in its first attempt."""
    if this_attempt() == 1:
        pause(f"charging {amount}")
    effect("charge", amount)
    return {"charged": amount}


@app.task
@step("charge", lease=60)
def charge_at_once(amount: int) -> dict[str, int]:
    effect("charge", amount)
    return {"charged": amount}


@app.task(autoretry_for=(Exception,), max_retries=3, default_retry_delay=0)
@step("charge", run_id="charge-{amount}", permanent=LookupError)
def charge_or_fail(amount: int, error: str) -> dict[str, int]:
    """Fails in its first attempt."""
    effect(error, amount)
    errors = {"permanent": PermanentError("no such card"), "lookup": KeyError(7), "other": OSError("no route")}
    if this_attempt() == 1:
        raise errors[error]
    return {"charged": amount}


@app.task(bind=True, max_retries=0, autoretry_for=(Exception,))
@step("charge", run_id="order-{number}", lease=60)
def charge_order(self: Any, number: int) -> list[Any]:
    """Has no retries of its own."""
    effect("charge", number)
    return [number, self.request.retries]


@app.task(bind=True, max_retries=2)
@step("charge", max_attempts=1)
def charge_and_retry(self: Any, amount: int) -> list[int]:
    """Asks Celery for a retry the first two times."""
    effect(f"called {self.request.retries}", amount)
    if self.request.retries < 2:
        raise self.retry(countdown=0, exc=OSError("not yet"))
    return [amount, this_attempt()]


@app.task(bind=True, max_retries=0)
@step("charge")
def charge_later(self: Any, amount: int) -> list[int]:
    if this_attempt() == 1:
        raise RetryLater(0.01)
    return [amount, self.request.retries]


@app.task
@step("charge")
def charge_or_give_up(amount: int, how: str) -> dict[str, int]:
    """Raises Ignore or Reject the first time."""
    effect(how, amount)
    if this_attempt() == 1:
        raise {"ignore": Ignore("later"), "reject": Reject("later", requeue=True)}[how]
    return {"charged": amount}


@app.task(bind=True)
@step("hand over")
def hand_over(self: Task, amount: int) -> Any:
    effect("hand over", amount)
    return self.replace(charge_at_once.s(amount))


@app.task
@step("charge", lease=6)
def charge_under_a_short_lease(amount: int) -> dict[str, int]:
    """Pauses before its effect."""
    pause(f"charging {amount}")
    effect("charge", amount)
    return {"charged": amount}


@app.task(time_limit=1, acks_on_failure_or_timeout=False)
@step("charge", lease=5)
def overstay_hard(amount: int) -> dict[str, int]:
    """Exceeds its hard time limit in its first attempt: Celery kills the child."""
    if this_attempt() == 1:
        client().rpush(f"reached overstaying {amount}", os.getpid())
        time.sleep(DEADLINE)
    effect("charge", amount)
    return {"charged": amount}


@app.task(soft_time_limit=1, autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
@step("charge", lease=60)
def overstay(amount: int) -> dict[str, int]:
    """Exceeds its soft time limit in its first attempt."""
    if this_attempt() == 1:
        for _ in range(DEADLINE):
            time.sleep(1)  # as in `pause`
    effect("charge", amount)
    return {"charged": amount}


@shared_task(bind=True, name="shared")
@step("charge")
def charge_shared(self: Any, amount: int) -> int:
    return amount


# Tasks of several steps


def reserve(amount: int) -> str:
    effect("reserve", amount)
    return f"parcel of {amount}"


@app.task
@steps(lease=60)
def ship(amount: int) -> list[str]:
    run = current_run()
    parcel = run.call("reserve", reserve, amount)
    pause(f"between {amount}")
    return [parcel, announce(parcel)]


@app.task
@step("announce", lease=60)
def announce(parcel: str) -> str:
    effect("announce", int(parcel.rpartition(" ")[2]))
    return f"{parcel}, announced"


@app.task
@step("add", lease=60)
def add(*numbers: Any) -> int:
    """Adds numbers, those in lists included, so that it can be the body of a chord."""
    total = sum(sum(each) if isinstance(each, list) else each for each in numbers)
    effect(f"add {total % 1000}", total)
    return total


@app.task
@step("charge parcel", run_id=lambda charged: f"parcel-{charged['charged']}")
def charge_parcel(charged: dict[str, int]) -> None:
    effect("charge parcel", charged["charged"])


@app.task
@step("add", lease=60)
def add_amount(charged: dict[str, int], number: int) -> int:
    effect("add", charged["charged"])
    return charged["charged"] + number
