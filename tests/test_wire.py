"""What travels between the store and a real server: how often, what a lost reply does, and what others may queue."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.crc import key_slot
from support.backends import Backend, Bench, Driven
from support.proxy import Proxy
from support.records import begun
from support.servers import SLOTS, find_binary

from squidstep_redis import (
    AsyncStepRunStore,
    Attempt,
    BeginResult,
    Call,
    Calls,
    InvalidArgumentError,
    OutcomeUnknownError,
    RefusedError,
    ReplyMismatchError,
    RunPage,
    ScheduleResult,
    StaleStepRunError,
    StepPage,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    UnsupportedClientError,
)
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.model import step_run_id
from squidstep_redis.protocol.scripts import directory, script

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # What redis-py 6.0 to 6.2 says of its own making of a cluster's pipeline.
    pytest.mark.filterwarnings("ignore:.*cluster_error_retry_attempts:DeprecationWarning"),
]

PAYLOAD = {"bytes": bytes(range(256)), "text": "naïve ☃ 𝄞 \r\n\0", "int": 2**64 - 1, "list": [None, True, 1.5, {}]}

OPERATIONS = {name: make for name, make in inspect.getmembers(Calls, inspect.isfunction) if name[0] != "_"}
SCANS = ("runs", "purge")
EXCHANGES = [name for name, make in OPERATIONS.items() if str(make.__annotations__["return"]).startswith("Exchange[")]
EXCHANGES += SCANS
CALLS = [name for name in OPERATIONS if name not in EXCHANGES]

# One call of each operation on what `prepare` leaves behind. An operation that is missing here fails every test below.
EXAMPLES: dict[str, Callable[[StepRunStore, StepRun], tuple[Any, ...]]] = {
    "schedule_step": lambda store, claim: (claim.run_id, "new", PAYLOAD),
    "schedule_steps": lambda store, claim: (claim.run_id, {"new": PAYLOAD, "pending": {}, "newer": {}}),
    "begin_step": lambda store, claim: (claim.run_id, "pending", {}),
    "complete_step": lambda store, claim: (claim, PAYLOAD),
    "advance_step": lambda store, claim: (claim, PAYLOAD, "pending", {}),
    "fail_step": lambda store, claim: (claim, PAYLOAD),
    "extend_claim": lambda store, claim: (claim, 120),
    "expire_claim": lambda store, claim: (claim,),
    "release_step": lambda store, claim: (claim,),
    "delete_pending_steps": lambda store, claim: (claim.run_id, ["pending", "running", "unknown"]),
    "get_step_run": lambda store, claim: (claim.run_id, "completed"),
    "get_run": lambda store, claim: (claim.run_id,),
    "scan_steps": lambda store, claim: (claim.run_id,),
    "attempts": lambda store, claim: (claim.run_id, "failed"),
    "completed_steps": lambda store, claim: (claim.run_id,),
    "completed_outputs": lambda store, claim: (claim.run_id,),
    "step_statuses": lambda store, claim: (claim.run_id,),
    "expire_run": lambda store, claim: (claim.run_id, 60),
    "delete_run": lambda store, claim: (claim.run_id,),
    "retry_step": lambda store, claim: (claim.run_id, "failed"),
    "retry_run": lambda store, claim: (claim.run_id,),
    "export_run": lambda store, claim: (claim.run_id,),
    "import_run": lambda store, claim: (EXPORTED,),
    "runs": lambda store, claim: (),
    "purge": lambda store, claim: (60,),
    "batch": lambda store, claim: (mixed(store, 7),),
    "lapsed_claims": lambda store, claim: (),
    "live_claims": lambda store, claim: (),
    "failed_steps": lambda store, claim: (),
    "count_claims": lambda store, claim: (),
    "wait_for_step": lambda store, claim: (claim.run_id, "completed", 10),
}
EXPORTED = {
    "squidstep_run": 1,
    "run_id": "imported",
    "ttl": None,
    "steps_created": 1,
    "completed": [],
    "steps": [
        {
            "step": "pending",
            "position": 1,
            "state": "pending",
            "created_at": "2026-01-01T00:00:00.000+00:00",
            "attempt": 0,
            "attempts_released": 0,
            "token": "",
            "scheduled_by": "",
            "input": {},
            "history": [],
        }
    ],
}
ACROSS_RUNS = {"lapsed_claims": "lapsed", "live_claims": "running", "failed_steps": "failed"}  # and what each finds


def prepare(bench: Bench, store: StepRunStore, run_id: str = "run") -> StepRun:
    """Makes a run with a step in every state, and answers the claim of the running one."""
    store.schedule_step(run_id, "pending", PAYLOAD)
    store.complete_step(begun(store.begin_step(run_id, "completed", PAYLOAD)), PAYLOAD)
    store.fail_step(begun(store.begin_step(run_id, "failed", {})), PAYLOAD)
    bench.lapse(begun(store.begin_step(run_id, "lapsed", {}, lease=0.001)))
    return begun(store.begin_step(run_id, "running", PAYLOAD, lease=60))


def perform(store: StepRunStore, operation: str, claim: StepRun) -> Any:
    return getattr(store, operation)(*EXAMPLES[operation](store, claim))


def mixed(store: StepRunStore, count: int) -> list[Call[Any]]:
    """So many calls, of seven operations, on runs that lie on all nodes of a cluster."""
    calls = store.calls
    made: list[Call[Any]] = []
    for number in range(count // 7 + 1):
        run, step = f"run-{number}", step_run_id(calls.prefix, f"run-{number}", "pay")
        made += [
            calls.schedule_step(run, "pay", {"number": number}),
            calls.begin_step(run, "pay", {}),
            calls.extend_claim(step, 60),
            calls.get_step_run(run, "pay"),
            calls.complete_step(step, {"number": number}, schedule={"mail": PAYLOAD}),
            calls.complete_step(step, {"another": number}),  # stale
            calls.get_run(run),
        ]
    return made[:count]


def seen(answer: Any) -> Any:
    """What an answer shows, without the times: the same for the same history."""
    if isinstance(answer, StepRun):
        shown = (answer.run_id, answer.step, answer.status, answer.attempt)
        return (*shown, answer.input, answer.output, answer.last_error, bool(answer.token))
    if isinstance(answer, Attempt):
        return answer[:4]
    if isinstance(answer, BeginResult | ScheduleResult):
        return tuple(map(seen, answer))
    if isinstance(answer, StepPage):
        return [seen(each) for each in answer.step_runs]
    if isinstance(answer, RunPage):
        return [each._replace(changed_at=None) for each in answer.runs]
    if isinstance(answer, dict) and "squidstep_run" in answer:
        return [(each["step"], each["state"], each["input"], each["output"]) for each in answer["steps"]]
    if isinstance(answer, list):
        return [seen(each) for each in answer]
    return type(answer) if isinstance(answer, Exception) else answer


def state(store: StepRunStore, run_id: str = "run") -> Any:
    """What there is to see of a run."""
    step_runs = store.get_run(run_id)
    attempts = [store.attempts(run_id, step_run.step) for step_run in step_runs]
    return seen(step_runs), seen(attempts), store.completed_steps(run_id)


def finish(bench: Bench, answer: Any) -> Any:
    """Waits for the answer of a redis-py client, if it is an asyncio one."""

    async def wait() -> Any:
        return await answer

    return bench.runner.run(wait()) if bench.runner is not None and inspect.isawaitable(answer) else answer


@contextlib.contextmanager
def pipeline_of(bench: Bench, store: StepRunStore, **options: bool) -> Iterator[Any]:
    """A pipeline that gives its connection back even if it was never executed."""
    pipeline: Any = store.client.pipeline(**options)
    try:
        yield pipeline
    finally:
        finish(bench, pipeline.reset())


@pytest.fixture
def proxy(bench: Bench) -> Iterator[Proxy]:
    with Proxy.to(bench.backend.raw) as proxy:
        yield proxy


@pytest.fixture
def connect(bench: Bench, proxy: Proxy) -> Iterator[Callable[..., StepRunStore]]:
    """Makes stores with from_url, through the proxy."""
    with contextlib.ExitStack() as opened:

        def connect(db: int = 0, **options: Any) -> StepRunStore:
            url = f"redis://127.0.0.1:{proxy.port}/{db}"
            options = {"prefix": bench.prefix, **options}
            if bench.runner is None:
                store = StepRunStore.from_url(url, **options)
            else:
                store = cast("StepRunStore", Driven(AsyncStepRunStore.from_url(url, **options), bench.runner))
            opened.callback(store.close)
            return store

        yield connect


@pytest.fixture
def proxied(connect: Callable[..., StepRunStore]) -> StepRunStore:
    return connect()


@pytest.fixture
def twin(bench: Bench) -> StepRunStore:
    """A store beside the tested one, where nothing goes wrong."""
    return bench.store(prefix=f"{bench.prefix}-twin")


@pytest.fixture
def known(bench: Bench) -> None:
    """The server knows all scripts."""
    for path in directory().glob("*.lua"):
        bench.backend.raw.script_load(script(path.stem).source)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries redis-py does not wait."""

    async def no_sleep(_: float) -> None: ...

    monkeypatch.setattr("redis.retry.sleep", lambda _: None)
    monkeypatch.setattr("redis.asyncio.retry.sleep", no_sleep)


class TestRoundTrips:
    @pytest.mark.parametrize("operation", CALLS)
    def test_an_operation_costs_one(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None, operation: str
    ) -> None:
        claim = prepare(bench, proxied)
        proxy.clear()

        perform(proxied, operation, claim)

        assert (proxy.round_trips, proxy.names()) == (1, ["EVALSHA"])

    @pytest.mark.parametrize("operation", CALLS)
    def test_an_operation_costs_two_when_the_server_does_not_know_its_script(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, operation: str
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        bench.backend.flush_scripts()
        proxy.clear()

        answer = perform(proxied, operation, claim)

        assert (proxy.round_trips, proxy.names()) == (2, ["EVALSHA", "EVAL"])
        assert seen(answer) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("flushed", [False, True])
    def test_a_batch_of_100_costs_one(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None, flushed: bool
    ) -> None:
        if flushed:
            bench.backend.flush_scripts()

        with proxy.batches(100):
            answers = proxied.batch(mixed(proxied, 100))

        assert proxy.round_trips == 1
        assert len(answers) == 100

    @pytest.mark.parametrize("operation", ACROSS_RUNS)
    def test_a_list_across_runs_costs_two(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, operation: str
    ) -> None:
        claim = prepare(bench, proxied)
        proxy.clear()

        with proxy.batches(1024, 1):
            (found,) = perform(proxied, operation, claim)

        assert proxy.round_trips == 2
        assert found.step == ACROSS_RUNS[operation]

    def test_every_operation_is_counted(self) -> None:
        counted = {*CALLS, "batch", "count_claims", *ACROSS_RUNS, *TestTheCostOfLists.COSTS}
        assert set(OPERATIONS) == set(EXAMPLES) == counted

    def test_the_live_claims_of_one_owner_cost_one_more_for_each_page_of_others(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None
    ) -> None:
        for number in range(5):
            begun(proxied.begin_step("run", f"others-{number}", {}, lease=60 + number, owner="other"))
        own = begun(proxied.begin_step("run", "own", {}, lease=120, owner="own"))
        proxy.clear()

        with proxy.batches(1024, 2, 2, 2):
            assert proxied.live_claims(2, owner="own") == [own]

        assert proxy.round_trips == 4


class TestTheCostOfLists:
    """On one small run; CLUSTER, by which `runs` and `purge` ask whether there are other servers, is not counted."""

    COSTS = (*SCANS, "retry_run")

    @pytest.mark.parametrize("operation", COSTS)
    def test_two(self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None, operation: str) -> None:
        bench.backend.raw.flushdb()  # what other tests left would have to be passed, too
        claim = prepare(bench, proxied)
        proxied.runs()  # now the server knows the script that scans
        proxy.clear()

        with proxy.batches(1, 1):
            perform(proxied, operation, claim)

        assert proxy.round_trips == 2


class TestLostReplies:
    """The server has run the call, the connection breaks in place of its reply, and redis-py sends the call again."""

    @pytest.mark.parametrize("losing", [1, 3])
    def test_begin_executes_once(self, proxy: Proxy, proxied: StepRunStore, known: None, losing: int) -> None:
        proxy.drop(losing)

        step_run = begun(proxied.begin_step("run", "pay", PAYLOAD, lease=60))

        assert proxy.names() == ["EVALSHA"] * (losing + 1)
        assert step_run.attempt == 1
        assert [attempt.number for attempt in proxied.attempts("run", "pay")] == [1]
        assert proxied.complete_step(step_run, PAYLOAD).output == PAYLOAD

    @pytest.mark.parametrize("losing", [1, 3])
    def test_complete_holds_one_place(self, proxy: Proxy, proxied: StepRunStore, known: None, losing: int) -> None:
        step_run = begun(proxied.begin_step("run", "pay", {}))
        proxy.clear()
        proxy.drop(losing)

        completed = proxied.complete_step(step_run, PAYLOAD, schedule={"mail": {}})

        assert proxy.names() == ["EVALSHA"] * (losing + 1)
        assert completed.output == PAYLOAD
        assert proxied.completed_steps("run") == ["pay"]
        assert proxied.completed_outputs("run") == [PAYLOAD]
        assert [step_run.step for step_run in proxied.get_run("run")] == ["pay", "mail"]

    @pytest.mark.parametrize("losing", [1, 3])
    @pytest.mark.parametrize("operation", CALLS)
    def test_every_operation_answers_the_same_as_without_loss(
        self,
        bench: Bench,
        proxy: Proxy,
        proxied: StepRunStore,
        twin: StepRunStore,
        known: None,
        operation: str,
        losing: int,
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.clear()
        proxy.drop(losing)

        answer = perform(proxied, operation, claim)

        assert proxy.names() == ["EVALSHA"] * (losing + 1)
        assert seen(answer) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("operation", EXCHANGES)
    def test_every_exchange_answers_the_same_as_without_loss(
        self,
        bench: Bench,
        proxy: Proxy,
        proxied: StepRunStore,
        twin: StepRunStore,
        operation: str,
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.drop(2)

        answer = perform(proxied, operation, claim)

        assert seen(answer) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("lost", ["all of it", "its tail"])
    def test_a_batch_that_was_run_is_sent_again_and_answers_the_same(
        self, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, no_pauses: None, lost: str
    ) -> None:
        def calls(store: StepRunStore) -> list[Call[Any]]:
            make = store.calls
            return [
                make.schedule_steps("run", {"scheduled": {}, "deleted": {}}),
                make.delete_pending_steps("run", ["deleted"]),
                make.complete_step(completing[store], PAYLOAD),
                make.fail_step(failing[store], PAYLOAD),
                make.release_step(releasing[store]),
                make.begin_step("run", "begun", PAYLOAD, lease=60),
                make.delete_run("deleted"),
            ]

        stores = (proxied, twin)
        completing = {store: begun(store.begin_step("run", "completed", {})) for store in stores}
        failing = {store: begun(store.begin_step("run", "failed", {})) for store in stores}
        releasing = {store: begun(store.begin_step("run", "released", {})) for store in stores}
        for store in stores:
            store.schedule_step("deleted", "step", {})
        expected = twin.batch(calls(twin))
        sent = calls(proxied)

        if lost == "all of it":
            proxy.drop()
            with proxy.batches(len(sent), len(sent)):
                answers = proxied.batch(sent)
        else:
            proxy.after(4, proxy.drop)
            answers = proxied.batch(sent)

        assert seen(answers) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("operation", CALLS)
    def test_a_call_that_never_arrived_is_sent_again(
        self,
        bench: Bench,
        proxy: Proxy,
        proxied: StepRunStore,
        twin: StepRunStore,
        operation: str,
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.cut(2)

        assert seen(perform(proxied, operation, claim)) == seen(expected)
        assert state(proxied) == state(twin)

    def test_until_the_deadline_and_then_the_same_call_can_be_sent_again(
        self, proxy: Proxy, connect: Callable[..., StepRunStore], known: None
    ) -> None:
        store = connect(timeout=1)
        proxy.drop(1_000)

        with pytest.raises(OutcomeUnknownError, match="begin_step, run 'run', step 'pay': no answer came") as caught:
            store.begin_step("run", "pay", {})

        assert len(proxy.commands) > 2
        proxy.heal()
        assert caught.value.call is not None
        assert begun(store.send(caught.value.call)).attempt == 1

    @pytest.mark.parametrize("losing", [1, 3, 10])
    def test_a_client_with_redis_pys_own_retries(
        self, bench: Bench, proxy: Proxy, known: None, no_pauses: None, losing: int
    ) -> None:
        """It re-sends by itself, up to ten times, or not at all: that depends on the version of redis-py.

        The store's own patience comes on top of it; here it has none.
        """
        if bench.runner is None:
            client: Any = redis.Redis(host="127.0.0.1", port=proxy.port)
            store = StepRunStore(client, prefix=bench.prefix)
        else:
            client = redis.asyncio.Redis(host="127.0.0.1", port=proxy.port)
            store = cast("Any", Driven(AsyncStepRunStore(client, prefix=bench.prefix), bench.runner))

        def once(call: Call[Any]) -> Any:
            return store.send(call._replace(again=False))

        def insist(call: Call[Any]) -> Any:
            proxy.clear()
            proxy.drop(losing)
            for _ in range(losing):
                with contextlib.suppress(OutcomeUnknownError):
                    return once(call)
            return once(call)

        step_run = begun(insist(store.calls.begin_step("run", "pay", {}, lease=60)))
        assert len(proxy.commands) == losing + 1
        assert step_run.attempt == 1
        completed = insist(store.calls.complete_step(step_run, PAYLOAD))
        assert completed.output == PAYLOAD
        assert store.completed_steps("run") == ["pay"]
        finish(bench, client.close() if bench.runner is None else client.aclose())


class TestScriptFlush:
    """SCRIPT FLUSH, a restart or a failover: the server forgets the scripts, at the worst moment."""

    def test_before_a_batch(self, bench: Bench, store: StepRunStore, twin: StepRunStore) -> None:
        expected = twin.batch(mixed(twin, 40))
        bench.backend.flush_scripts()

        answers = store.batch(mixed(store, 40))

        assert seen(answers) == seen(expected)

    @pytest.mark.parametrize("after", range(1, 6))
    def test_within_a_batch_nothing_runs_twice(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, after: int
    ) -> None:
        calls = proxied.calls
        claims = [begun(proxied.begin_step("run", f"step-{number}", {})) for number in range(3)]
        proxy.clear()
        proxy.after(after, bench.backend.flush_scripts)

        answers = proxied.batch(
            [calls.begin_step(f"run-{number}", "pay", {}) for number in range(3)]
            + [calls.complete_step(claim, {"of": claim.step}) for claim in claims]
        )

        assert [begun(answer).attempt for answer in answers[:3]] == [1, 1, 1]
        assert [len(proxied.attempts(f"run-{number}", "pay")) for number in range(3)] == [1, 1, 1]
        assert [answer.output for answer in answers[3:]] == [{"of": claim.step} for claim in claims]
        assert sorted(proxied.completed_steps("run")) == [claim.step for claim in claims]

    @pytest.mark.parametrize("after", range(1, 15))
    def test_within_a_batch_the_order_in_a_run_is_kept(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, after: int
    ) -> None:
        def calls(store: StepRunStore) -> list[Call[Any]]:
            make, id = store.calls, partial(step_run_id, store.calls.prefix, "run")
            return [
                make.begin_step("run", "a", {}),
                make.begin_step("run", "b", {}),
                make.complete_step(id("a"), {}),
                make.complete_step(id("b"), {}),
                make.schedule_step("run", "c", {"first": True}),
                make.begin_step("run", "c", {"first": False}),
                make.fail_step(id("c"), {"why": 1}),
                make.begin_step("run", "c", {}),
                make.get_run("run"),
            ]

        expected = twin.batch(calls(twin))
        proxy.after(after, bench.backend.flush_scripts)

        answers = proxied.batch(calls(proxied))

        assert seen(answers) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("transaction", [True, False])
    @pytest.mark.parametrize("after", range(5))
    def test_within_a_pipeline_of_the_users_own(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, transaction: bool, after: int
    ) -> None:
        pipeline = proxied.client.pipeline(transaction=transaction)
        pipeline.set(f"{bench.prefix}:own", "1")
        began = proxied.queue(pipeline, proxied.calls.begin_step("run", "pay", PAYLOAD))
        again = proxied.queue(pipeline, proxied.calls.begin_step("run", "pay", PAYLOAD))
        proxy.after(after, bench.backend.flush_scripts)  # also between MULTI and EXEC

        replies = finish(bench, pipeline.execute())

        assert begun(began.result(replies)).attempt == 1
        assert again.result(replies).busy
        assert bench.backend.raw.get(f"{bench.prefix}:own") == b"1"


class TestBatch:
    def test_results_and_errors_come_in_order(self, store: StepRunStore) -> None:
        calls = store.calls
        pay = begun(store.begin_step("run", "pay", {}))
        ship = begun(store.begin_step("run", "ship", {}))
        unknown = step_run_id(calls.prefix, "run", "unknown")
        store.fail_step(ship.id, {})

        answers = store.batch(
            [
                calls.get_step_run("run", "unknown"),
                calls.complete_step(ship, {}),
                calls.complete_step(pay, {"receipt": 7}),
                calls.complete_step(unknown, {}),
                calls.completed_outputs("run"),
            ]
        )

        assert answers[0] is None
        assert isinstance(answers[1], StaleStepRunError)
        assert answers[1].current.step == "ship"
        assert isinstance(answers[2], StepRun)
        assert isinstance(answers[3], StepRunNotFoundError)
        assert answers[4] == [{"receipt": 7}]

    def test_an_empty_one_sends_nothing(self, proxy: Proxy, proxied: StepRunStore) -> None:
        assert proxied.batch([]) == []
        assert proxy.commands == []

    def test_any_iterable_will_do(self, store: StepRunStore) -> None:
        calls = (store.calls.schedule_step("run", f"step-{number}", {}) for number in range(3))

        assert [answer.decision for answer in cast("list[ScheduleResult]", store.batch(calls))] == ["schedule"] * 3

    @pytest.mark.parametrize("item", [None, "call", ("run", "pay")])
    def test_what_is_no_call_is_refused_and_nothing_sent(
        self, proxy: Proxy, proxied: StepRunStore, item: object
    ) -> None:
        with pytest.raises(InvalidArgumentError, match=r"calls\[1\]: must be a Call from store\.calls"):
            proxied.batch([proxied.calls.begin_step("run", "pay", {}), cast("Any", item)])

        assert proxy.commands == []

    def test_a_script_that_the_server_refuses_is_that_calls_error_alone(
        self, bench: Bench, store: StepRunStore
    ) -> None:
        """Here: an ACL user may not touch one of two runs, so the server stops the script itself."""
        allowed, forbidden = (bench.keys(run)[0].rpartition(b":")[0].decode() for run in ("allowed", "forbidden"))
        assert allowed != forbidden
        raw = bench.backend.raw
        keys = [f"~{allowed}:*", f"~{bench.prefix}:*claims", f"~{bench.prefix}:*failed"]
        raw.execute_command("ACL SETUSER", bench.prefix, "on", ">secret", "+@all", *keys)
        try:
            limited = bench.store(client_options={"username": bench.prefix, "password": "secret"})
            answers = limited.batch([limited.calls.schedule_step(run, "pay", {}) for run in ("forbidden", "allowed")])
        finally:
            raw.execute_command("ACL DELUSER", bench.prefix)

        assert isinstance(answers[0], RefusedError | OutcomeUnknownError)  # which of them, the server's words decide
        assert isinstance(answers[1], ScheduleResult)
        assert store.get_run("forbidden") == []


@pytest.mark.servers("cluster")
class TestBatchOnACluster:
    """A proxy stands before each of the three nodes."""

    @pytest.fixture
    def proxies(self, bench: Bench) -> Iterator[list[Proxy]]:
        nodes = sorted(bench.backend.raw.nodes_manager.slots_cache.items())
        primaries = dict.fromkeys((node.host, node.port) for _, (node, *_) in nodes)
        assert len(primaries) == 3
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(Proxy(address)) for address in primaries]

    @pytest.fixture
    def proxied(self, bench: Bench, proxies: list[Proxy]) -> StepRunStore:
        ports = {cast("Any", proxy.server)[1]: proxy.port for proxy in proxies}

        def through_proxy(address: tuple[str, int]) -> tuple[str, int]:
            return address[0], ports.get(address[1], address[1])

        store = bench.store(client_options={"address_remap": through_proxy})
        store.batch(store.calls.get_run(f"run-{number}") for number in range(20))  # connects to every node
        for proxy in proxies:
            proxy.clear()
        return store

    def spread(self, calls: list[Call[Any]]) -> list[int]:
        """How many of the calls go to each node: the slots are shared out evenly."""
        nodes = [key_slot(call.keys[0]) * 3 // SLOTS for call in calls]
        return [nodes.count(node) for node in range(3)]

    def test_it_costs_one_round_trip_per_node(
        self, proxies: list[Proxy], proxied: StepRunStore, twin: StepRunStore
    ) -> None:
        calls = mixed(proxied, 100)
        counts = self.spread(calls)
        assert min(counts) > 10

        with contextlib.ExitStack() as stack:
            for proxy, count in zip(proxies, counts, strict=True):
                stack.enter_context(proxy.batches(count))
            answers = proxied.batch(calls)

        assert [proxy.round_trips for proxy in proxies] == [1, 1, 1]
        assert seen(answers) == seen(twin.batch(mixed(twin, 100)))

    def test_an_operation_costs_one_round_trip(self, proxies: list[Proxy], proxied: StepRunStore) -> None:
        step_run = begun(proxied.begin_step("run-1", "pay", {}))
        proxied.complete_step(step_run, {})
        for proxy in proxies:
            proxy.clear()

        step_run = begun(proxied.begin_step("run-1", "ship", {}))
        proxied.complete_step(step_run, {})

        assert sum(proxy.round_trips for proxy in proxies) == 2

    @pytest.mark.parametrize("lost", ["all of it", "its tail"])
    def test_a_node_that_does_not_answer_is_asked_again(
        self, proxies: list[Proxy], proxied: StepRunStore, twin: StepRunStore, lost: str
    ) -> None:
        def calls(store: StepRunStore) -> list[Call[Any]]:
            return [store.calls.begin_step(f"run-{number}", "pay", {"n": number}) for number in range(30)]

        counts = self.spread(calls(proxied))
        if lost == "all of it":
            proxies[1].drop()
            with proxies[1].batches(counts[1]):
                answers = proxied.batch(calls(proxied))
        else:
            proxies[1].after(3, proxies[1].drop)
            answers = proxied.batch(calls(proxied))

        assert seen(answers) == seen(twin.batch(calls(twin)))
        assert all(len(proxied.attempts(f"run-{number}", "pay")) == 1 for number in range(30))

    def test_the_order_within_a_run_is_that_of_the_calls(self, store: StepRunStore) -> None:
        runs = [f"run-{number}" for number in range(12)]
        steps = [f"step-{number}" for number in range(5)]
        store.batch(store.calls.begin_step(run, step, {}) for step in steps for run in runs)
        ids = {(run, step): step_run_id(store.calls.prefix, run, step) for run in runs for step in steps}

        store.batch(store.calls.complete_step(ids[run, step], {}) for step in reversed(steps) for run in runs)

        assert [store.completed_steps(run) for run in runs] == [steps[::-1]] * 12

    def test_scripts_that_one_node_forgot(self, proxies: list[Proxy], proxied: StepRunStore) -> None:
        with redis.Redis(port=cast("Any", proxies[1].server)[1]) as node:
            proxies[1].after(2, node.script_flush)
            answers = proxied.batch(proxied.calls.begin_step(f"run-{number}", "pay", {}) for number in range(30))

        assert [begun(cast("BeginResult", answer)).attempt for answer in answers] == [1] * 30


class TestQueue:
    """The user's own pipeline: his commands and the store's commit together."""

    @pytest.mark.parametrize("transaction", [True, False])
    def test_own_commands_around_it(self, bench: Bench, store: StepRunStore, transaction: bool) -> None:
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

    def test_a_refusal_is_raised_by_result_and_the_rest_took_effect(self, bench: Bench, store: StepRunStore) -> None:
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

    def test_watching_without_a_conflict(self, bench: Bench, store: StepRunStore) -> None:
        pipeline = store.client.pipeline()
        finish(bench, pipeline.watch(f"{bench.prefix}:own"))
        pipeline.multi()
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))

        assert begun(began.result(finish(bench, pipeline.execute()))).input == PAYLOAD

    @pytest.mark.parametrize("transaction", [True, False])
    def test_watching_without_multi_is_refused(self, bench: Bench, store: StepRunStore, transaction: bool) -> None:
        with pipeline_of(bench, store, transaction=transaction) as pipeline:
            finish(bench, pipeline.watch(f"{bench.prefix}:own"))

            with pytest.raises(UnsupportedClientError, match=r"is watching .*: call multi\(\) first"):
                store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

        assert bench.dump() == {}

    def test_a_transaction_of_a_client_that_decodes_is_refused(self, bench: Bench) -> None:
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

    def test_a_plain_pipeline_of_a_client_that_decodes(self, bench: Bench) -> None:
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

    def test_a_resp3_client(self, bench: Bench, connect: Callable[..., StepRunStore]) -> None:
        store = connect(protocol=3)
        pipeline = store.client.pipeline()
        began = store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))
        read = store.queue(pipeline, store.calls.get_run("run"))

        replies = finish(bench, pipeline.execute())

        assert begun(began.result(replies)).input == PAYLOAD
        assert read.result(replies)[0].input == PAYLOAD

    @pytest.mark.parametrize("what", ["pipeline", "client", "list"])
    def test_what_is_no_pipeline_is_refused(self, store: StepRunStore, what: str) -> None:
        pipeline = {"pipeline": None, "client": store.client, "list": []}[what]

        with pytest.raises(UnsupportedClientError, match="must be a redis-py pipeline"):
            store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

    @pytest.mark.parametrize("item", [None, "call", ("run", "pay")])
    def test_what_is_no_call_is_refused(self, store: StepRunStore, item: Any) -> None:
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
    def test_own_commands_around_it(self, bench: Bench, decoding: bool) -> None:
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
    def test_a_transaction_in_the_runs_slot(self, bench: Bench, store: StepRunStore) -> None:
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
    def test_watching_without_multi_is_refused(self, bench: Bench, store: StepRunStore) -> None:
        with pipeline_of(bench, store, transaction=True) as pipeline:
            finish(bench, pipeline.watch(self.own_key(bench, "run")))

            with pytest.raises(UnsupportedClientError, match=r"is watching .*: call multi\(\) first"):
                store.queue(pipeline, store.calls.begin_step("run", "pay", {}))

        assert bench.dump() == {}

    @pytest.mark.usefixtures("has_transactions")
    def test_a_transaction_of_a_client_that_decodes_is_refused(self, bench: Bench) -> None:
        store = bench.store(client_options={"decode_responses": True})
        store.get_run("run")
        pipeline = store.client.pipeline(transaction=True)

        with pytest.raises(UnsupportedClientError, match="use a client without decode_responses"):
            store.queue(pipeline, store.calls.begin_step("run", "pay", PAYLOAD))

        assert len(pipeline) == 0


@pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")
class TestClientOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"decode_responses": True},
            {"protocol": 3},
            {"protocol": 3, "decode_responses": True},
            {"encoding": "ascii", "encoding_errors": "ignore", "decode_responses": True},
        ],
        ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
    )
    def test_every_operation_works(
        self, request: pytest.FixtureRequest, bench: Bench, twin: StepRunStore, options: dict[str, Any]
    ) -> None:
        if bench.backend.name == "cluster":
            store = bench.store(client_options=options)
        else:
            store = request.getfixturevalue("connect")(**options)  # TCP: redis-py 7 has no RESP3 over a unix socket

        for operation in [*EXCHANGES, *CALLS]:
            expected = perform(twin, operation, prepare(bench, twin, operation))
            assert seen(perform(store, operation, prepare(bench, store, operation))) == seen(expected)
            assert state(store, operation) == state(twin, operation)

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_db_selection(self, bench: Bench, connect: Callable[..., StepRunStore]) -> None:
        store = connect(db=3)

        store.complete_step(begun(store.begin_step("run", "pay", PAYLOAD)), PAYLOAD)

        assert store.completed_outputs("run") == [PAYLOAD]
        assert connect(db=2).get_run("run") == []
        assert bench.dump() == {}

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_from_url_takes_redis_pys_options_over_its_own(self, connect: Callable[..., StepRunStore]) -> None:
        store = connect(decode_responses=True, protocol=3, socket_timeout=1, client_name="worker")

        assert begun(store.begin_step("run", "pay", PAYLOAD)).input == PAYLOAD
        assert store.batch([store.calls.get_step_run("run", "pay")])[0] is not None


OTHERS = {
    "of another call": b"*3\r\n$9\r\ncompleted\r\n$1\r\n0\r\n$1\r\nx\r\n",
    "an empty array": b"*0\r\n",
    "nothing": b"$-1\r\n",
    "no array": b"*-1\r\n",
    "OK": b"+OK\r\n",
    "a number": b":1\r\n",
    "a string": b"$2\r\nhi\r\n",
}


class TestRepliesToAnotherCall:
    @pytest.mark.parametrize("reply", OTHERS.values(), ids=OTHERS)
    def test_is_noticed_and_the_call_sent_again(
        self, proxy: Proxy, proxied: StepRunStore, known: None, reply: bytes
    ) -> None:
        proxy.answer(reply)

        assert begun(proxied.begin_step("run", "pay", {})).attempt == 1
        assert proxy.names() == ["EVALSHA", "EVALSHA"]

    @pytest.mark.parametrize("operation", CALLS)
    def test_is_noticed_by_every_operation(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, known: None, operation: str
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.answer(OTHERS["of another call"])

        assert seen(perform(proxied, operation, claim)) == seen(expected)
        assert state(proxied) == state(twin)

    def test_to_the_deadline_it_is_an_error_and_the_same_call_can_be_sent_again(
        self, proxy: Proxy, connect: Callable[..., StepRunStore], known: None
    ) -> None:
        store = connect(timeout=0.5)
        proxy.answer(*[OTHERS["of another call"]] * 1_000)

        with pytest.raises(ReplyMismatchError, match="begin_step, run 'run', step 'pay': the connection") as caught:
            store.begin_step("run", "pay", {})

        proxy.heal()
        assert caught.value.call is not None
        assert begun(store.send(caught.value.call)).attempt == 1

    def test_a_reply_left_on_the_connection_answers_nobody(
        self, proxy: Proxy, proxied: StepRunStore, known: None
    ) -> None:
        left = OTHERS["of another call"]
        proxy.answer(left + left)  # of which one stays behind

        for number in range(5):
            step_run = begun(proxied.begin_step(f"run-{number}", "pay", {"n": number}))
            assert (step_run.attempt, step_run.input) == (1, {"n": number})

    def test_in_a_batch_each_call_is_sent_again(self, proxy: Proxy, proxied: StepRunStore) -> None:
        calls = [proxied.calls.begin_step(f"run-{number}", "pay", {"n": number}) for number in range(5)]
        left = OTHERS["of another call"]
        proxy.answer(left + left)

        answers = [begun(cast("BeginResult", answer)) for answer in proxied.batch(calls)]

        assert [(step_run.attempt, step_run.input["n"]) for step_run in answers] == [(1, n) for n in range(5)]


@pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")
def test_a_cancelled_task_leaves_no_reply_behind(backend: Backend, runner: asyncio.Runner) -> None:
    """Cancelled at every point of a call or of a batch: the calls that follow get their own replies."""

    async def main() -> None:
        client = backend.connect_asyncio()
        store = AsyncStepRunStore(client, prefix="test-cancelled")
        for operation in (store.send, lambda call: store.batch([call] * 3)):
            for steps in range(25):
                task = asyncio.ensure_future(operation(store.calls.begin_step("cancelled", f"step-{steps}", {})))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                for number in range(3):
                    result = await store.begin_step(f"run-{operation}", f"{steps}-{number}", {"n": number})
                    assert begun(result).input == {"n": number}
        await client.aclose()

    runner.run(main())


class TestClients:
    """With what the promises cannot be kept is refused when the store is made."""

    @pytest.fixture
    def client(self, bench: Bench) -> Any:
        return bench.store().client

    @pytest.fixture
    def make(self, bench: Bench) -> Callable[[Any], object]:
        return StepRunStore if bench.runner is None else AsyncStepRunStore

    def test_a_single_connection_client(self, bench: Bench, make: Callable[[Any], object]) -> None:
        connect = bench.backend.connect if bench.runner is None else bench.backend.connect_asyncio
        client = connect(single_connection_client=True)

        with pytest.raises(UnsupportedClientError, match="has a single connection.*use a pooled client"):
            make(client)
        finish(bench, client.close() if bench.runner is None else client.aclose())

    def test_a_single_connection_client_made_from_another(
        self, bench: Bench, client: Any, make: Callable[[Any], object]
    ) -> None:
        single = client.client()

        with pytest.raises(UnsupportedClientError, match="has a single connection.*use a pooled client"):
            make(single)
        finish(bench, single.close() if bench.runner is None else single.aclose())

    @pytest.mark.parametrize("transaction", [True, False])
    def test_a_pipeline(self, client: Any, make: Callable[[Any], object], transaction: bool) -> None:
        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client.pipeline(transaction=transaction))

    @pytest.mark.parametrize("client", ["redis://localhost", None, 6379, redis.ConnectionPool, redis.Redis])
    def test_no_client_at_all(self, make: Callable[[Any], object], client: object) -> None:
        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client)

    @pytest.mark.servers("valkey", "cluster")
    def test_one_of_the_other_flavour(self, bench: Bench, make: Callable[[Any], object]) -> None:
        wrong = bench.backend.connect_asyncio if bench.runner is None else bench.backend.connect
        client = wrong()

        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client)
        if bench.runner is not None:
            client.close()

    @pytest.mark.servers("cluster")
    def test_a_pipeline_of_a_cluster(self, client: Any, make: Callable[[Any], object]) -> None:
        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client.pipeline())

    def test_a_pooled_client_whose_pool_has_one_connection(self, bench: Bench) -> None:
        store = bench.store(client_options={"max_connections": 1})

        assert store.complete_step(begun(store.begin_step("run", "pay", PAYLOAD)), {}).input == PAYLOAD


@pytest.mark.servers("valkey")
def test_a_client_from_sentinel(bench: Bench, tmp_path: Path) -> None:
    binary = find_binary(bench.backend.name)
    config, launcher = tmp_path / "sentinel.conf", tmp_path / "sentinel"
    config.touch()
    launcher.write_text(f'#!/bin/sh\nexec "{binary}" "{config}" --sentinel "$@"\n')
    launcher.chmod(0o700)
    with EmbeddedServer(port=0, binary=binary) as primary, EmbeddedServer(port=0, binary=launcher) as sentinel:
        with redis.Redis.from_url(sentinel.url) as client:
            client.execute_command("SENTINEL MONITOR", "main", primary.host, primary.port, 1)
        addresses = [(sentinel.host, sentinel.port)]
        if bench.runner is None:
            found: Any = redis.sentinel.Sentinel(addresses)
            store = StepRunStore(found.master_for("main"))
        else:
            found = redis.asyncio.sentinel.Sentinel(addresses)
            store = cast("StepRunStore", Driven(AsyncStepRunStore(found.master_for("main")), bench.runner))

        step_run = begun(store.begin_step("run", "pay", PAYLOAD, lease=60))
        assert store.complete_step(step_run, PAYLOAD).output == PAYLOAD
        assert store.batch([store.calls.completed_outputs("run")]) == [[PAYLOAD]]
        pipeline = store.client.pipeline()
        began = store.queue(pipeline, store.calls.begin_step("run", "mail", PAYLOAD))
        assert begun(began.result(finish(bench, pipeline.execute()))).input == PAYLOAD

        for client in (store.client, *found.sentinels):
            finish(bench, client.close() if bench.runner is None else client.aclose())
