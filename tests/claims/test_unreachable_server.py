"""A server that is unreachable when a claim ends: the result is re-sent for the duration of the lease."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis
from support.backends import Bench
from support.claims import (
    SHORT_LEASE,
    DeclinedError,
    UnreachableClient,
    Worker,
    charge,
    connected,
    fakeredis_only,
    on_failure,
    outcomes,
    real_server,
    take_over,
)
from support.internals import replace_client
from support.servers import find_binary, wait_until

from squidstep_redis import (
    NotSentError,
    Outcome,
    OutcomeUnknownError,
    ServerError,
    StepRunStore,
)
from squidstep_redis.claims.retrying import retry_until
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.workflow import Send, Sleep


class TestUnreachableServer:
    @real_server
    @pytest.mark.parametrize("how", ["kill", "pause"])
    def test_result_is_recorded_once_the_server_is_back(self, bench: Bench, how: str) -> None:
        given: list[dict[str, Any]] = []
        failed: list[Exception] = []
        options = {"appendonly": "yes", "appendfsync": "always"}
        with (  # TCP: redis-py 5.0 has no timeout for unix sockets
            EmbeddedServer(binary=find_binary(bench.backend.name), options=options, port=0) as server,
            connected(bench, server.url, socket_timeout=0.1, timeout=2) as worker,
        ):

            def work(input: dict[str, Any]) -> dict[str, Any]:
                given.append(input)
                server.kill() if how == "kill" else server.pause()
                return charge(input)

            def come_back(error: Exception) -> None:
                failed.append(error)
                if how == "pause":
                    server.resume()
                elif len(failed) == 2:
                    server.start()

            on_failure(worker, "complete_step", come_back)

            assert worker.execute(work) == {"charged": 1}
            assert worker.execute(work) == {"charged": 1}
            assert worker.store.completed_steps("run") == ["pay"]
            assert outcomes(worker.store) == [Outcome.COMPLETED]
        assert given == [{"amount": 1}]
        assert failed

    @fakeredis_only
    @pytest.mark.slow
    def test_unreachable_server_raises_and_the_lease_expires(self, worker: Worker, others: StepRunStore) -> None:
        unreachable = UnreachableClient(worker.store.client, redis.ConnectionError("down"))

        def work(input: dict[str, Any]) -> dict[str, Any]:
            unreachable.replace_client_of(worker.plain_store)
            return charge(input)

        with pytest.raises(OutcomeUnknownError, match="down") as caught:
            worker.execute(work, lease=1.5)

        assert unreachable.asked >= 3
        assert any("could not record this failure: OutcomeUnknownError" in note for note in caught.value.__notes__)
        assert outcomes(others) == [Outcome.RUNNING]
        wait_until(lambda: others.begin_step("run", "pay", {}).decision == "execute")

    @pytest.mark.slow
    @pytest.mark.parametrize("lease", [30, None])
    def test_failure_is_recorded_once_the_server_replies(
        self, worker: Worker, others: StepRunStore, lease: float | None
    ) -> None:
        client = worker.store.client
        unreachable = UnreachableClient(client, redis.ConnectionError("down"))
        failed: list[Exception] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            unreachable.replace_client_of(worker.plain_store)
            raise DeclinedError

        def come_back(error: Exception) -> None:
            failed.append(error)
            if len(failed) == 3:
                replace_client(worker.plain_store, client)

        on_failure(worker, "fail_step", come_back)
        with pytest.raises(DeclinedError) as caught:
            worker.execute(work, lease=lease)

        assert not hasattr(caught.value, "__notes__")
        assert outcomes(others) == [Outcome.FAILED]

    @pytest.mark.slow
    def test_recording_a_failure_stops_when_the_lease_has_passed(self, worker: Worker, others: StepRunStore) -> None:
        unreachable = UnreachableClient(worker.store.client, redis.TimeoutError("slow"))

        def work(input: dict[str, Any]) -> dict[str, Any]:
            unreachable.replace_client_of(worker.plain_store)
            raise DeclinedError

        with pytest.raises(DeclinedError) as caught:
            worker.execute(work, lease=SHORT_LEASE)

        assert unreachable.asked > 1
        (note,) = caught.value.__notes__
        assert "could not record this failure: OutcomeUnknownError: fail_step, run 'run', step 'pay'" in note
        assert outcomes(others) == [Outcome.RUNNING]

    @pytest.mark.slow
    def test_retry_never_claims_that_nothing_was_sent(self, worker: Worker) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            UnreachableClient(worker.store.client, redis.TimeoutError("slow")).replace_client_of(worker.plain_store)
            on_failure(worker, "complete_step", refuse_connections)
            return charge(input)

        def refuse_connections(error: Exception) -> None:
            refusing = UnreachableClient(worker.store.client, redis.ConnectionError("refused"), sends=False)
            refusing.replace_client_of(worker.plain_store)

        with pytest.raises(OutcomeUnknownError, match="refused"):
            worker.execute(work, lease=SHORT_LEASE)

    @pytest.mark.parametrize("error", [redis.ResponseError("no"), redis.AuthenticationError("no")], ids=repr)
    def test_permanent_error_is_not_retried(self, worker: Worker, error: Exception) -> None:
        unreachable = UnreachableClient(worker.store.client, error)

        with worker.claim() as claim:
            unreachable.replace_client_of(worker.plain_store)
            with pytest.raises(ServerError, match="no") as caught:
                claim.complete({})
            assert caught.value.__cause__ is error
            assert unreachable.asked == 1
            replace_client(worker.plain_store, worker.store.client)
            claim.complete({})

    @pytest.mark.slow
    def test_completion_that_failed_can_be_repeated(self, worker: Worker, others: StepRunStore) -> None:
        client = worker.store.client
        with worker.claim(lease=SHORT_LEASE) as claim:
            UnreachableClient(client, redis.ConnectionError("down")).replace_client_of(worker.plain_store)
            with pytest.raises(OutcomeUnknownError):
                claim.complete({"receipt": 7})
            replace_client(worker.plain_store, client)
            worker.wait_for_extension(claim)
            claim.complete({"receipt": 7})

        assert others.completed_outputs("run") == [{"receipt": 7}]

    @pytest.mark.slow
    def test_loss_is_signaled_after_a_completion_that_failed(self, worker: Worker, others: StepRunStore) -> None:
        client = worker.store.client
        with worker.claim(lease=SHORT_LEASE) as claim:
            UnreachableClient(client, redis.ConnectionError("down")).replace_client_of(worker.plain_store)
            with pytest.raises(OutcomeUnknownError):
                claim.complete({"by": "zombie"})
            replace_client(worker.plain_store, client)
            take_over(others)

            worker.wait(claim.lost.is_set)


def test_result_is_not_resent_for_longer_than_the_lease() -> None:
    """The store's timeout does not restart with each call: the last one ends with the lease, and one attempt."""
    call = Calls("squidstep", None, 1_000_000, None).get_run("run")
    sending = retry_until(call, time.monotonic() + 60)
    first = next(sending)
    assert isinstance(first, Send)
    assert first.seconds is None
    assert isinstance(sending.throw(NotSentError("get_run", "run", None, "down", True)), Sleep)
    second = next(sending)
    assert isinstance(second, Send)
    assert second.seconds is not None
    assert 30 < second.seconds < 60
