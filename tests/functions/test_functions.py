"""Calls of functions as steps, with `store.step` and `store.run`: on both stores."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
from support.backends import Bench
from support.claims import DeclinedError, asyncio_only, blocking_only
from support.records import stored

from squidstep_redis import (
    InputMismatchError,
    InvalidArgumentError,
    PayloadError,
    StepBusyError,
    StepExhaustedError,
    StepFailedError,
    StepRunStore,
    StepStatus,
    current_claim,
)

pytestmark = pytest.mark.servers("fakeredis", "valkey")  # every server executes the same scripts

SECRET = "hunter2"


class Shop:
    """Functions for steps, as plain functions or coroutine functions, and how often each was called."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.calls: Counter[str] = Counter()

    def of(self, fn: Callable[..., Any]) -> Any:
        """Returns the function, with asyncio as a coroutine function, so that its calls are counted."""

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[fn.__name__] += 1
            return fn(*args, **kwargs)

        @wraps(fn)
        async def call_asyncio(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return call(*args, **kwargs)

        return call if self.bench.runner is None else call_asyncio

    def finish(self, result: Any) -> Any:
        """Returns the result of a call, awaited if it is a coroutine."""
        return result if self.bench.runner is None else self.bench.runner.run(result)

    def step(self, store: StepRunStore, fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Returns the function as a step, to be called like a plain function."""
        options = {"run_id": "run", **options}
        decorated = store.step("pay", **options)(self.of(fn))
        return lambda *args, **kwargs: self.finish(decorated(*args, **kwargs))

    def call(self, run: Any, step: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Calls the function as a step of the run."""
        return self.finish(run.call(step, self.of(fn), *args, **kwargs))


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@pytest.fixture
def shop(bench: Bench) -> Shop:
    return Shop(bench)


def charge(order_id: int, amount: int = 1, *, note: str = "") -> dict[str, int]:
    return {"charged": amount}


def charge_all(*args: int, **kwargs: int) -> int:
    return sum(args)


def decline(order_id: int) -> None:
    raise DeclinedError("no funds")


def reserve(count: int) -> tuple[str, int]:
    return "parcel", count


def log_in(user: str, password: Any) -> str:
    if password == "wrong":
        raise DeclinedError("access denied")
    return f"{user} {'with' if password else 'without'} password"


class TestDecoratedFunction:
    def test_each_run_id_executes_once_and_returns_the_stored_result(self, shop: Shop, store: StepRunStore) -> None:
        pay = shop.step(store, charge, run_id="order-{order_id}")
        assert [pay(7, amount=42), pay(7, 43), pay(order_id=7)] == [{"charged": 42}] * 3
        assert pay(8) == {"charged": 1}
        assert shop.calls == {"charge": 2}
        step_run = stored(store, "order-7")
        assert (step_run.input, step_run.output) == ({"order_id": 7, "amount": 42}, {"result": {"charged": 42}})

    def test_run_id_can_be_a_function_of_the_arguments(self, shop: Shop, store: StepRunStore) -> None:
        pay = shop.step(store, charge, run_id=lambda order_id, amount, note: f"{order_id}-{amount}{note}")
        pay(7)
        pay(7, 2, note="!")
        assert [stored(store, run_id).attempt for run_id in ("7-1", "7-2!")] == [1, 1]

    @pytest.mark.parametrize("result", [None, 0, "text", [1], {"result": 1}, {}])
    def test_any_result_is_returned_as_it_was(self, shop: Shop, store: StepRunStore, result: Any) -> None:
        pay = shop.step(store, lambda: result)
        assert [pay(), pay()] == [result] * 2
        assert sum(shop.calls.values()) == 1

    def test_tuple_is_returned_as_a_list_from_the_start(self, shop: Shop, store: StepRunStore) -> None:
        pay = shop.step(store, reserve)
        assert [pay(3), pay(3)] == [["parcel", 3]] * 2

    def test_exception_is_recorded_and_the_next_call_executes(self, shop: Shop, store: StepRunStore) -> None:
        with pytest.raises(DeclinedError):
            shop.step(store, decline)(7)
        assert (stored(store).status, (stored(store).last_error or {})["message"]) == (StepStatus.FAILED, "no funds")
        assert shop.step(store, charge)(8) == {"charged": 1}
        assert (stored(store).attempt, stored(store).input) == (2, {"order_id": 8})

    def test_settings_are_those_of_run_step(self, shop: Shop, store: StepRunStore) -> None:
        owners: list[Any] = []

        def observe(amount: int) -> None:
            claim = current_claim()
            assert claim is not None
            owners.append((claim.step_run.owner, claim.step_run.lease_ends_at))
            raise DeclinedError

        once = shop.step(store, observe, max_attempts=1, owner="till-3", lease=None, fingerprint=True)
        with pytest.raises(DeclinedError):
            once(7)
        assert owners == [("till-3", None)]
        with pytest.raises(InputMismatchError):
            once(8)
        with pytest.raises(StepExhaustedError):
            once(7)
        final = shop.step(store, observe, run_id="other", permanent=DeclinedError)
        with pytest.raises(DeclinedError):
            final(7)
        with pytest.raises(StepFailedError):
            final(7)

    def test_busy_step_raises_without_a_call(self, shop: Shop, store: StepRunStore) -> None:
        store.begin_step("run", "pay", {}, lease=60)
        with pytest.raises(StepBusyError):
            shop.step(store, charge)(7)
        assert shop.calls == {}

    def test_step_completed_in_another_way_returns_its_whole_output(self, shop: Shop, store: StepRunStore) -> None:
        store.complete_step(store.begin_step("run", "pay", {}).step_run, {"charged": 3, "currency": "EUR"})
        assert shop.step(store, charge)(7) == {"charged": 3, "currency": "EUR"}

    def test_scheduled_step_is_called_with_its_scheduled_arguments(self, shop: Shop, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 9})
        assert shop.step(store, charge)(7, 42) == {"charged": 9}
        store.schedule_step("other", "pay", {"amout": 9})
        with pytest.raises(InvalidArgumentError, match=r"scheduled with \['amout'\], which its function does not acc"):
            shop.step(store, charge, run_id="other")(7)

    @pytest.mark.parametrize("scheduled", [{"args": 5}, {"kwargs": 5}, {"kwargs": [["amount", 1]]}])
    def test_scheduled_arguments_of_another_shape_are_rejected(
        self, shop: Shop, store: StepRunStore, scheduled: dict[str, Any]
    ) -> None:
        store.schedule_step("run", "pay", scheduled)
        with pytest.raises(InvalidArgumentError, match="^input: the step was scheduled with .* as \\*"):
            shop.step(store, charge_all)(7)
        assert shop.calls == {}

    def test_step_within_itself_is_rejected_at_once(self, shop: Shop, store: StepRunStore) -> None:
        decorated: list[Any] = []

        def blocking() -> Any:
            return decorated[0]()

        async def asyncio_() -> Any:
            return await decorated[0]()

        decorated.append(store.step("pay", run_id="run")(asyncio_ if shop.bench.runner else blocking))
        with pytest.raises(InvalidArgumentError, match="this code itself is executing step 'pay' of run 'run'"):
            shop.finish(decorated[0]())
        assert stored(store, "run").status == "failed"

    def test_function_keeps_its_name_and_signature(self, shop: Shop, store: StepRunStore) -> None:
        fn = shop.of(charge)
        decorated = store.step("pay", run_id="run")(fn)
        assert (decorated.__name__, inspect.signature(decorated)) == ("charge", inspect.signature(charge))
        assert inspect.iscoroutinefunction(decorated) is inspect.iscoroutinefunction(fn)

    def test_wrong_arguments_are_a_type_error_and_send_nothing(self, shop: Shop, store: StepRunStore) -> None:
        with pytest.raises(TypeError, match=r"^charge\(\): missing a required argument: 'order_id'"):
            shop.step(store, charge)()
        with pytest.raises(TypeError, match=r"^charge\(\): missing a required argument: 'order_id'"):
            shop.call(store.run("run"), "pay", charge)
        with pytest.raises(TypeError, match="unexpected keyword argument 'amuont'"):
            shop.step(store, charge)(7, amuont=3)
        assert (store.get_run("run"), shop.calls) == ([], {})

    def test_payload_errors_say_how_the_payload_is_made(self, shop: Shop, store: StepRunStore) -> None:
        with pytest.raises(PayloadError, match=r"input\['order_id'\]") as given:
            shop.step(store, charge)(object())
        assert (store.get_run("run"), shop.calls) == ([], {})
        with pytest.raises(PayloadError, match=r"output\['result'\]") as returned:
            shop.step(store, object)()
        for error in (given.value, returned.value):
            assert [note for note in error.__notes__ if "Pass plain data, such as an id" in note]
        with pytest.raises(StepFailedError):  # the function may have taken effect
            shop.step(store, charge)(7)

    @blocking_only
    def test_threads_that_wait_execute_once(self, shop: Shop, store: StepRunStore) -> None:
        pay = shop.step(store, charge, on_busy="wait")
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(pay, range(8), range(8))) == [stored_result(store)] * 8
        assert shop.calls == {"charge": 1}

    @asyncio_only
    def test_tasks_that_wait_execute_once(self, shop: Shop, store: StepRunStore) -> None:
        pay: Any = store.step("pay", run_id="run", on_busy="wait")(shop.of(charge))

        async def pay_at_once() -> list[Any]:
            return await asyncio.gather(*(pay(number, number) for number in range(8)))

        results = shop.finish(pay_at_once())
        assert results == [stored_result(store)] * 8
        assert shop.calls == {"charge": 1}

    def test_lost_replies_do_not_repeat_the_call(self, shop: Shop, bench: Bench) -> None:
        assert shop.step(bench.store(lost_replies=1), charge)(7) == {"charged": 1}
        assert shop.calls == {"charge": 1}


def stored_result(store: StepRunStore) -> Any:
    return (stored(store).output or {})["result"]


class TestExcludedArguments:
    def test_reach_the_function_and_not_the_server(self, shop: Shop, store: StepRunStore, bench: Bench) -> None:
        enter = shop.step(store, log_in, exclude=("password",))
        assert enter("ada", SECRET) == "ada with password"
        assert stored(store).input == {"user": "ada"}
        shop.call(store.run("other", exclude=("password",)), "pay", log_in, "ada", password=SECRET)
        assert stored(store, "other").input == {"user": "ada"}
        assert SECRET not in repr(bench.dump())

    def test_need_not_be_storable(self, shop: Shop, store: StepRunStore) -> None:
        assert shop.step(store, log_in, exclude=("password",))("ada", object()) == "ada with password"

    def test_redelivery_executes_with_its_own(self, shop: Shop, store: StepRunStore) -> None:
        enter = shop.step(store, log_in, exclude=("password",))
        with pytest.raises(DeclinedError):
            enter("ada", "wrong")
        assert [enter("ada", SECRET), enter("ada", "")] == ["ada with password"] * 2

    def test_scheduled_step_executes_with_those_of_the_call(self, shop: Shop, store: StepRunStore) -> None:
        enter = shop.step(store, log_in, run_id="{user}", exclude=("password",))
        store.schedule_step("ada", "pay", {"user": "bob"})
        store.schedule_step("eve", "pay", {"user": "bob", "password": ""})
        assert [enter("ada", SECRET), enter("eve", SECRET)] == ["bob with password"] * 2

    def test_are_no_part_of_the_fingerprint(self, shop: Shop, store: StepRunStore) -> None:
        given: list[dict[str, Any]] = []

        def user(arguments: dict[str, Any]) -> str:
            given.append(arguments)
            return arguments["user"]

        for fingerprint in (True, user):
            enter = shop.step(
                store, log_in, run_id=repr(fingerprint)[:5], exclude=("password",), fingerprint=fingerprint
            )
            assert [enter("ada", password) for password in (SECRET, "another")] == ["ada with password"] * 2
        assert given == [{"user": "ada"}] * 2

    def test_are_compared_with_no_other_call_of_the_run(self, shop: Shop, store: StepRunStore) -> None:
        run = store.run("run", exclude=("password",))
        assert [shop.call(run, "pay", log_in, "ada", password) for password in "ab"] == ["ada with password"] * 2
        with pytest.raises(InputMismatchError):
            shop.call(run, "pay", log_in, "bob", "a")

    def test_can_be_among_keyword_arguments_of_any_name(self, shop: Shop, store: StepRunStore) -> None:
        def connect(host: str, *ports: int, **options: str) -> list[Any]:
            return [host, list(ports), options]

        enter = shop.step(store, connect, run_id="{host}", exclude=("password", "ports"))
        assert enter("a", 1, user="ada", password=SECRET) == ["a", [1], {"user": "ada", "password": SECRET}]
        assert stored(store, "a").input == {"host": "a", "options": {"user": "ada"}}
        store.schedule_step("b", "pay", {"host": "c", "options": {"user": "bob", "password": "stored"}})
        assert enter("b", 1, user="ada", password=SECRET) == ["c", [1], {"user": "bob", "password": SECRET}]
        whole = shop.step(store, connect, run_id="whole", exclude=("options",))
        assert whole("d", user="ada") == ["d", [], {"user": "ada"}]
        assert stored(store, "whole").input == {"host": "d"}

    def test_make_a_method_a_step(self, shop: Shop, store: StepRunStore) -> None:
        class Till:
            def __init__(self, number: int) -> None:
                self.number = number

            def name(self, order_id: int) -> str:
                return f"till {self.number}"

            pay = store.step("pay", run_id="order-{order_id}", exclude=("self",))(shop.of(name))

        assert [shop.finish(Till(number).pay(7)) for number in (1, 2)] == ["till 1"] * 2
        assert stored(store, "order-7").input == {"order_id": 7}


class TestRun:
    def test_steps_execute_once_across_run_objects(self, shop: Shop, store: StepRunStore) -> None:
        for _ in range(2):
            run = store.run("order-7")
            assert shop.call(run, "reserve", reserve, 3) == ["parcel", 3]
            assert shop.call(run, "charge", charge, 7, amount=42) == {"charged": 42}
        assert shop.calls == {"reserve": 1, "charge": 1}
        assert store.completed_steps("order-7") == ["reserve", "charge"]
        assert (run.id, repr(run).endswith("Run 'order-7'>")) == ("order-7", True)

    def test_failed_step_stops_there_and_is_the_first_to_execute(self, shop: Shop, store: StepRunStore) -> None:
        for fn in (decline, charge):
            run = store.run("order-7")
            shop.call(run, "reserve", reserve, 3)
            if fn is decline:
                with pytest.raises(DeclinedError):
                    shop.call(run, "charge", fn, 7)
            else:
                assert shop.call(run, "charge", fn, 7) == {"charged": 1}
        assert shop.calls == {"reserve": 1, "decline": 1, "charge": 1}

    def test_two_inputs_of_one_step_are_rejected(self, shop: Shop, store: StepRunStore) -> None:
        run = store.run("run")
        assert shop.call(run, "reserve", reserve, 3) == shop.call(run, "reserve", reserve, count=3)
        with pytest.raises(InputMismatchError) as caught:
            shop.call(run, "reserve", reserve, 4)
        assert "In a loop, give each call its own step name" in caught.value.__notes__[0]
        assert shop.call(run, "reserve-4", reserve, 4) == ["parcel", 4]
        assert shop.call(store.run("run"), "reserve", reserve, 4) == ["parcel", 3]  # another execution
        assert shop.calls == {"reserve": 2}

    def test_failed_call_may_be_followed_by_another_input(self, shop: Shop, store: StepRunStore) -> None:
        run = store.run("run")
        with pytest.raises(DeclinedError):
            shop.call(run, "pay", decline, 7)
        assert shop.call(run, "pay", charge, 8) == {"charged": 1}

    def test_exception_that_cannot_be_changed_is_raised_as_it_is(self, shop: Shop, store: StepRunStore) -> None:
        """Python's own `contextmanager` turns a frozen dataclass into a FrozenInstanceError."""

        def refuse(order_id: int) -> None:
            raise FrozenError(order_id)

        run = store.run("run", backoff=lambda attempt: -1)  # about which the error would get a note
        for _ in range(2):
            with pytest.raises(FrozenError):
                shop.call(run, "pay", refuse, 7)
        assert (stored(store).status, stored(store).attempt) == (StepStatus.FAILED, 2)

    def test_settings_apply_to_each_step(self, shop: Shop, store: StepRunStore) -> None:
        run = store.run("run", max_attempts=1, owner="till-3", fingerprint=True)
        with pytest.raises(DeclinedError):
            shop.call(run, "pay", decline, 7)
        assert (stored(store).owner, store.attempts("run", "pay")[0].owner) == ("till-3", "till-3")
        with pytest.raises(StepExhaustedError):
            shop.call(run, "pay", decline, 7)
        with pytest.raises(InputMismatchError):
            shop.call(store.run("run", fingerprint=True), "pay", decline, 8)

    def test_generator_function_is_rejected(self, store: StepRunStore, shop: Shop) -> None:
        def each() -> Any:
            yield 7

        async def each_asyncio() -> Any:
            yield 7

        for fn in (each, each_asyncio):
            with pytest.raises(InvalidArgumentError, match="is a generator function"):
                shop.finish(store.run("run").call("pay", fn))
        assert store.get_run("run") == []
