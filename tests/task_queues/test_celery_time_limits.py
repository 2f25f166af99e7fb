"""The soft time limit of the prefork pool: a signal whose handler raises, at any instruction."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_process_init
from support.interruptions import sigusr1_raises

from squidstep_redis import signals
from squidstep_redis.celery import step
from squidstep_redis.celery.stores import configure, store
from squidstep_redis.signals import defer_sigalrm

pytest_plugins = ["support.celery_fixtures"]


class SignalingRedis(fakeredis.FakeStrictRedis):
    """A client that raises SIGUSR1 in one call: before it sends the command, or after the reply."""

    moment = ""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self._signal("before")
        reply = super().execute_command(*args, **options)
        self._signal("after")
        return reply

    def _signal(self, moment: str) -> None:
        if moment == self.moment:
            self.moment = ""
            signal.raise_signal(signal.SIGUSR1)


@pytest.fixture(autouse=True)
def child_of_prefork(fresh_stores: None) -> Iterator[None]:
    """Makes this process one of the pool's children, as far as it concerns signals."""
    worker_process_init.send(sender=None)
    yield
    signals.also_defer(None)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_result_is_stored_before_the_soft_limit_raises(eager: Any, moment: str) -> None:
    client = SignalingRedis()
    configure(lambda: client)

    @eager.task
    @step("charge", run_id="order")
    def charge() -> int:
        client.moment = moment  # the next command completes the step
        return 7

    with sigusr1_raises(SoftTimeLimitExceeded()):
        result = charge.delay()
        assert isinstance(result.result, SoftTimeLimitExceeded)
    assert store().get_step_run("order", "charge").output == {"result": 7}
    assert charge.delay().get() == 7


def test_signal_is_delivered_while_the_block_sleeps() -> None:
    with sigusr1_raises(SoftTimeLimitExceeded()) as raised, defer_sigalrm() as deferred:
        signal.raise_signal(signal.SIGUSR1)
        assert not raised.is_set()
        with pytest.raises(SoftTimeLimitExceeded):
            deferred.sleep(0)
        raised.clear()
        deferred.__exit__()
        assert not raised.is_set()


def test_handlers_are_restored_after_the_block() -> None:
    with sigusr1_raises(SoftTimeLimitExceeded()):
        before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGALRM)
        with defer_sigalrm():
            assert signal.getsignal(signal.SIGUSR1) != before[0]
        assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGALRM)) == before
        with pytest.raises(SoftTimeLimitExceeded):
            os.kill(os.getpid(), signal.SIGUSR1)
