"""`fork_run` when a reply is lost permanently: before it has written anything, and after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import OutcomeUnknownError, RunExistsError, ServerError, StepRunStore

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")

MANY = 1_000


@pytest.fixture
def impatient(connect: Callable[..., StepRunStore], known: None) -> StepRunStore:
    """A store with a short timeout, and a completed step."""
    store = connect(timeout=1)
    store.complete_step(begun(store.begin_step("run", "a", {})), {"n": 1})
    return store


def test_fork_without_a_read_reply_reports_that_nothing_was_written(proxy: Proxy, impatient: StepRunStore) -> None:
    proxy.drop(MANY, script="export_run")

    with pytest.raises(
        ServerError, match=r"fork_run, run 'run': no reply .* nothing was written; call fork_"
    ) as caught:
        impatient.fork_run("run", "new")

    assert not isinstance(caught.value, OutcomeUnknownError)
    assert caught.value.transient
    proxy.heal()
    assert impatient.get_run("new") == []
    assert impatient.fork_run("run", "new") == ["a"]


def test_fork_whose_write_gets_no_reply_can_be_sent_again(proxy: Proxy, impatient: StepRunStore) -> None:
    proxy.drop(MANY, script="import_run")

    with pytest.raises(OutcomeUnknownError, match="fork_run, run 'new': no reply") as caught:
        impatient.fork_run("run", "new")

    proxy.heal()
    assert caught.value.call is not None
    assert impatient.send(caught.value.call) == ["a"]
    assert impatient.completed_outputs("new") == [{"n": 1}]
    with pytest.raises(RunExistsError):
        impatient.fork_run("run", "new")
