"""`queue`: calls of the store in the user's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from support.backends import Bench
from support.operations import (
    PAYLOAD,
    finish,
    pipeline_of,
)
from support.records import begun

from squidstep_redis import (
    InvalidArgumentError,
    StaleStepRunError,
    StepRunStore,
    UnsupportedClientError,
)

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # redis-py 6.0 to 6.2 warns about how it makes a cluster's pipeline itself.
    pytest.mark.filterwarnings("ignore:.*cluster_error_retry_attempts:DeprecationWarning"),
]


class TestQueue:
    """The user's own pipeline: its commands and the store's calls commit together."""

    @pytest.mark.parametrize("transaction", [True, False])
    def test_commands_of_the_user_and_calls_run_in_order(
        self, bench: Bench, store: StepRunStore, transaction: bool
    ) -> None:
        pipeline = store.client.pipeline(transaction=transaction)
        key = f"{bench.prefix}:own"

        pipeline.set(key, "before")
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD, lease=60))
        pipeline.append(key, ", after")
        statuses = store.queue(pipeline, store.calls.step_statuses("run"))
        pipeline.get(key)
        replies = finish(bench, pipeline.execute())

        assert len(replies) == 5
        assert (replies[0], replies[2], replies[4]) == (True, 13, b"before, after")
        step_run = begun(began.result(replies))
        assert step_run.input == PAYLOAD
        assert statuses.result(replies) == {"pay": "running"}
        assert store.complete_step(step_run, PAYLOAD).output == PAYLOAD

    def test_result_raises_a_refusal_and_the_rest_takes_effect(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        store.complete_step(step_run.id, {"by": "operator"})
        pipeline = store.client.pipeline()
        pipeline.set(f"{bench.prefix}:own", "1")
        completing = store.queue(pipeline, store.calls.complete_step(step_run, {}))

        replies = finish(bench, pipeline.execute())

        with pytest.raises(StaleStepRunError, match="is completed by attempt 1"):
            completing.result(replies)
        assert bench.backend.raw.get(f"{bench.prefix}:own") == b"1"

    def test_a_watch_conflict_writes_nothing(self, bench: Bench, store: StepRunStore) -> None:
        key = f"{bench.prefix}:own"
        pipeline = store.client.pipeline()
        finish(bench, pipeline.watch(key))
        bench.backend.raw.set(key, "another's")
        pipeline.multi()
        pipeline.set(key, "mine")
        store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

        with pytest.raises(redis.WatchError):
            finish(bench, pipeline.execute())

        assert bench.dump() == {key.encode(): b"another's"}

    def test_watching_without_a_conflict_executes_the_call(self, bench: Bench, store: StepRunStore) -> None:
        pipeline = store.client.pipeline()
        finish(bench, pipeline.watch(f"{bench.prefix}:own"))
        pipeline.multi()
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))

        assert begun(began.result(finish(bench, pipeline.execute()))).input == PAYLOAD

    @pytest.mark.parametrize("transaction", [True, False])
    def test_queueing_between_watch_and_multi_is_rejected(
        self, bench: Bench, store: StepRunStore, transaction: bool
    ) -> None:
        with pipeline_of(bench, store, transaction=transaction) as pipeline:
            finish(bench, pipeline.watch(f"{bench.prefix}:own"))

            with pytest.raises(UnsupportedClientError, match=r"is watching .*: call multi\(\) first"):
                store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

        assert bench.dump() == {}

    def test_a_transaction_of_a_decoding_client_is_rejected(self, bench: Bench) -> None:
        store = bench.store(client_options={"decode_responses": True})
        pipeline = store.client.pipeline()

        with pytest.raises(UnsupportedClientError, match="use a client without decode_responses"):
            store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))

        assert len(pipeline) == 0

    def test_multi_turns_a_pipeline_into_a_transaction(self, bench: Bench) -> None:
        store = bench.store(client_options={"decode_responses": True})
        with pipeline_of(bench, store, transaction=False) as pipeline:
            finish(bench, pipeline.watch(f"{bench.prefix}:own"))
            pipeline.multi()

            with pytest.raises(UnsupportedClientError, match="use a client without decode_responses"):
                store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))

    def test_a_plain_pipeline_of_a_decoding_client_works(self, bench: Bench) -> None:
        store = bench.store(client_options={"decode_responses": True})
        pipeline = store.client.pipeline(transaction=False)
        pipeline.set(f"{bench.prefix}:own", "text")
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", {}))
        read = store.queue(pipeline, store.calls.schedule_step("run", "mail", PAYLOAD))
        pipeline.get(f"{bench.prefix}:own")

        replies = finish(bench, pipeline.execute())

        assert begun(began.result(replies)).attempt == 1
        assert read.result(replies).step_run.input == PAYLOAD
        assert replies[3] == "text"

    def test_a_pipeline_of_a_resp3_client_works(self, bench: Bench, connect: Callable[..., StepRunStore]) -> None:
        store = connect(protocol=3)
        pipeline = store.client.pipeline()
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))
        read = store.queue(pipeline, store.calls.get_run("run"))

        replies = finish(bench, pipeline.execute())

        assert begun(began.result(replies)).input == PAYLOAD
        assert read.result(replies)[0].input == PAYLOAD

    @pytest.mark.parametrize("what", ["pipeline", "client", "list"])
    def test_value_that_is_not_a_pipeline_is_rejected(self, store: StepRunStore, what: str) -> None:
        pipeline = {"pipeline": None, "client": store.client, "list": []}[what]

        with pytest.raises(UnsupportedClientError, match="must be a redis-py pipeline"):
            store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

    @pytest.mark.parametrize("item", [None, "call", ("run", "pay")])
    def test_value_that_is_not_a_call_is_rejected(self, store: StepRunStore, item: Any) -> None:
        pipeline = store.client.pipeline()

        with pytest.raises(InvalidArgumentError, match=r"must be a Call from store\.calls"):
            store.queue(pipeline, item)

        assert len(pipeline) == 0


@pytest.mark.servers("cluster")
class TestQueueOnACluster:
    """RedisCluster's own pipeline refuses EVALSHA, but takes EVAL, which is what is queued."""

    def own_key(self, bench: Bench, run_id: str) -> bytes:
        """A key of the user's own, in the run's slot."""
        return bench.keys(run_id)[0].rpartition(b":")[0] + b":own"

    @pytest.fixture
    def has_transactions(self, bench: Bench) -> None:
        module = redis.cluster if bench.runner is None else redis.asyncio.cluster
        if not hasattr(module, "TransactionStrategy"):
            pytest.skip("this redis-py has no transactions on a cluster: they came with 6.1, for asyncio with 6.2")

    @pytest.mark.parametrize("decoding", [False, True])
    def test_commands_of_the_user_and_calls_run_in_order(self, bench: Bench, decoding: bool) -> None:
        store = bench.store(client_options={"decode_responses": decoding})
        pipeline = store.client.pipeline()
        runs = [f"run-{number}" for number in range(6)]  # on all three nodes
        queued = []
        for run in runs:
            pipeline.set(self.own_key(bench, run), "text")
            queued.append(store.queue(pipeline, store.calls.begin_step(run, "pay", PAYLOAD)))
            queued.append(store.queue(pipeline, store.calls.get_step_run(run, "pay")))
            pipeline.get(self.own_key(bench, run))

        replies = finish(bench, pipeline.execute())

        assert [begun(began.result(replies)).attempt for began in queued[::2]] == [1] * 6
        assert [read.result(replies).input for read in queued[1::2]] == [PAYLOAD] * 6
        assert replies[3::4] == ["text" if decoding else b"text"] * 6

    @pytest.fixture
    def store(self, bench: Bench) -> StepRunStore:
        store = bench.store()
        store.get_run("run")  # an asyncio transaction of a client that has not connected leaks connections
        return store

    @pytest.mark.usefixtures("has_transactions")
    def test_a_transaction_in_the_slot_of_the_run_works(self, bench: Bench, store: StepRunStore) -> None:
        key = self.own_key(bench, "run")
        pipeline = store.client.pipeline(transaction=True)
        pipeline.set(key, "mine")
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))

        replies = finish(bench, pipeline.execute())

        assert begun(began.result(replies)).input == PAYLOAD
        assert bench.backend.raw.get(key) == b"mine"

    @pytest.mark.usefixtures("has_transactions")
    def test_a_watch_conflict_writes_nothing(self, bench: Bench, store: StepRunStore) -> None:
        key = self.own_key(bench, "run")
        pipeline = store.client.pipeline(transaction=True)
        finish(bench, pipeline.watch(key))
        bench.backend.raw.set(key, "another's")
        pipeline.multi()
        store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

        with pytest.raises(redis.WatchError):
            finish(bench, pipeline.execute())

        assert bench.dump() == {key: b"another's"}

    @pytest.mark.usefixtures("has_transactions")
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    def test_queueing_between_watch_and_multi_is_rejected(self, bench: Bench, store: StepRunStore) -> None:
        with pipeline_of(bench, store, transaction=True) as pipeline:
            finish(bench, pipeline.watch(self.own_key(bench, "run")))

            with pytest.raises(UnsupportedClientError, match=r"is watching .*: call multi\(\) first"):
                store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

        assert bench.dump() == {}

    @pytest.mark.usefixtures("has_transactions")
    def test_a_transaction_of_a_decoding_client_is_rejected(self, bench: Bench) -> None:
        store = bench.store(client_options={"decode_responses": True})
        store.get_run("run")
        pipeline = store.client.pipeline(transaction=True)

        with pytest.raises(UnsupportedClientError, match="use a client without decode_responses"):
            store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))

        assert len(pipeline) == 0
