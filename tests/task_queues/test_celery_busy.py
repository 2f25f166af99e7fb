"""What a task sends when its step cannot be executed now, on a broker in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import fakeredis
import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Reject, Retry

from squidstep_redis import RetryLater
from squidstep_redis.celery import configure, step, steps, store

pytest_plugins = ["support.celery_fixtures"]


class Deliveries:
    """Executes tasks as a worker does, and receives what they send.

    Attributes:
        app: the application, whose broker is in this process.
    """

    def __init__(self, url: str = "memory://") -> None:
        self.app: Any = Celery("deliveries", broker=url, set_as_current=False)
        self.app.conf.update(
            task_publish_retry=False,
            broker_transport_options={"visibility_timeout": 100, "max_retries": 1, "interval_start": 0},
        )

    def deliver(self, task: Any, **request: Any) -> Any:
        """Executes one delivery of a task without arguments, and returns its result or error."""
        request = {"id": str(uuid4()), "task": task.name, "delivery_info": {}, "retries": 0, **request}
        return build_tracer(task.name, task, app=self.app)(request["id"], (), {}, request).info.retval

    def sent(self) -> Any:
        """Returns the next message."""
        with self.app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
            message = queue.get(block=False)
            message.ack()
            return message


def countdown(message: Any) -> float:
    return (datetime.fromisoformat(message.headers["eta"]) - datetime.now(UTC)).total_seconds()


@pytest.fixture
def deliveries(fresh_stores: None) -> Iterator[Deliveries]:
    connection = fakeredis.FakeStrictRedis()
    configure(lambda: connection)
    yield Deliveries()
    connection.close()


def as_step(**options: Any) -> Callable[..., Any]:
    @step("charge", run_id="order", **options)
    def charge() -> None:
        raise AssertionError

    return charge


def test_busy_task_looks_again_at_growing_intervals(deliveries: Deliveries) -> None:
    held, _ = store().begin_step("order", "charge", {}, lease=600)
    task = deliveries.app.task(shared=False, max_retries=0, autoretry_for=(Exception,))(as_step())
    headers: Any = None
    for looks in range(7):
        error = deliveries.deliver(task, id="the id", headers=headers)
        message = deliveries.sent()
        headers = {"squidstep_redis": message.headers["squidstep_redis"]}
        assert isinstance(error, Retry)
        assert (message.headers["id"], message.headers["retries"]) == ("the id", 0)
        assert min(2**looks, 50) - 1 < countdown(message) <= 1.1 * 2**looks  # 50: half the visibility timeout

    store().expire_claim(held)  # another worker takes over: its work begins now
    store().begin_step("order", "charge", {}, lease=600)
    deliveries.deliver(task, headers=headers)
    assert countdown(deliveries.sent()) <= 1


def test_busy_task_looks_again_when_the_lease_ends(deliveries: Deliveries) -> None:
    store().begin_step("order", "charge", {}, lease=3)
    task = deliveries.app.task(shared=False)(as_step())
    headers = {"squidstep_redis": {"claim": "", "looks": 9}, "theirs": 1}
    deliveries.deliver(task, headers=headers)
    message = deliveries.sent()
    headers["squidstep_redis"] = {**message.headers["squidstep_redis"], "looks": 9}
    deliveries.deliver(task, headers=headers)
    message = deliveries.sent()
    assert 1 < countdown(message) <= 4
    assert message.headers["theirs"] == 1


def test_delayed_step_is_delivered_when_the_delay_ends(deliveries: Deliveries) -> None:
    claim, _ = store().begin_step("order", "charge", {}, lease=600)
    store().fail_step(claim, {"no": "route"}, retry_after=20)
    task = deliveries.app.task(shared=False)(as_step())
    assert isinstance(deliveries.deliver(task), Retry)
    assert 19 < countdown(deliveries.sent()) <= 22


def test_retry_later_of_several_steps_is_a_retry(deliveries: Deliveries) -> None:
    @deliveries.app.task(shared=False)
    @steps()
    def ship() -> None:
        raise RetryLater(20)

    assert isinstance(deliveries.deliver(ship), Retry)
    assert 19 < countdown(deliveries.sent()) <= 22


def test_task_that_cannot_be_sent_returns_to_its_queue(deliveries: Deliveries) -> None:
    store().begin_step("order", "charge", {}, lease=600)
    unreachable = Deliveries("redis://127.0.0.1:1/0")
    error = unreachable.deliver(unreachable.app.task(shared=False)(as_step()))
    assert isinstance(error, Reject)
    assert error.requeue


def test_function_can_catch_the_error_of_a_called_task(deliveries: Deliveries) -> None:
    store().begin_step("order", "charge", {}, lease=600)
    charge = deliveries.app.task(shared=False)(as_step())

    @deliveries.app.task(shared=False)
    def ship() -> None:
        try:
            charge()
        except Exception as error:
            raise LookupError(type(error).__name__) from error

    assert deliveries.deliver(ship).args == ("StepBusyError",)
