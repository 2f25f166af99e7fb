"""The decorators under `@app.task`, in tasks that Celery executes in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from celery import shared_task

from squidstep_redis import (
    InputMismatchError,
    InvalidArgumentError,
    PermanentError,
    RetryLater,
    StepBusyError,
    StepExhaustedError,
    StepFailedError,
    current_claim,
)
from squidstep_redis.celery import current_run, default_run_id, owner, step, steps, store

pytest_plugins = ["support.celery_fixtures"]


def work() -> None: ...


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def describe(amount: int) -> str:
    return f"parcel of {amount}"


def test_function_outside_a_task_runs_as_if_undecorated(eager: Any) -> None:
    calls: list[int] = []

    @step("charge")
    def charge(amount: int) -> tuple[int]:
        calls.append(amount)
        return (amount,)

    task = eager.task(charge)
    assert [charge(7), task(7)] == [(7,), (7,)]
    assert calls == [7, 7]
    assert store().runs().runs == []


def test_function_with_a_run_id_is_a_step_outside_tasks(eager: Any) -> None:
    calls: list[int] = []

    @step("charge", run_id="order-{amount}")
    def charge(amount: int) -> int:
        calls.append(amount)
        return amount

    assert [charge(7), charge(7)] == [7, 7]
    assert calls == [7]


def test_task_returns_the_stored_result(eager: Any) -> None:
    @eager.task
    @step("charge", run_id="order-{amount}")
    def charge(amount: int) -> tuple[int, str]:
        claim = current_claim()
        assert claim is not None
        return amount, str(claim.step_run.owner)

    first, second = charge.delay(7), charge.apply((7,))
    assert first.get() == second.get() == [7, f"{owner(None)} {first.id}"]
    assert store().completed_steps("order-7") == ["charge"]


@pytest.mark.parametrize("decorate", [step("charge", run_id="order"), steps(run_id="order")], ids=["step", "steps"])
def test_wrong_arguments_are_rejected_before_the_task_is_sent(eager: Any, decorate: Any) -> None:
    eager.conf.task_always_eager = False

    @eager.task
    @decorate
    def charge(order_id: int, *, amount: int = 1) -> int:
        raise NotImplementedError

    @eager.task(bind=True)
    @decorate
    def charge_bound(self: Any, order_id: int) -> int:
        raise NotImplementedError

    with pytest.raises(TypeError, match=r"charge\(\) missing 1 required positional argument: 'order_id'"):
        charge.delay()
    with pytest.raises(TypeError, match="unexpected keyword argument 'amuont'"):
        charge.apply_async((7,), {"amuont": 1})
    with pytest.raises(TypeError, match=r"charge_bound\(\) missing 1 required positional argument: 'order_id'"):
        charge_bound.delay()


@pytest.mark.parametrize("run_id", ["order-{amount}", lambda amount: f"order-{amount}"])
def test_self_of_a_bound_task_is_not_an_argument(eager: Any, run_id: Any) -> None:
    @eager.task(bind=True)
    @step("charge", run_id=run_id)
    def charge(self: Any, amount: int) -> str:
        return f"{amount} by {self.request.id}"

    task = charge.delay(7)
    assert task.get() == f"7 by {task.id}"
    assert store().get_step_run("order-7", "charge").input == {"amount": 7}


def test_shared_task_can_be_a_step(eager: Any) -> None:
    eager.set_current()

    @shared_task
    @step("charge", run_id="shared-{amount}")
    def charge_shared(amount: int) -> int:
        return amount

    assert charge_shared.delay(7).get() == 7
    assert store().completed_steps("shared-7") == ["charge"]


def test_tasks_called_by_a_task_are_steps_of_its_run(eager: Any) -> None:
    @eager.task
    @step("announce")
    def announce(parcel: str) -> str:
        return f"{parcel}, announced"

    @eager.task
    @steps()
    def ship(amount: int) -> str:
        return announce(current_run().call("reserve", describe, amount))

    task = ship.delay(7)
    assert task.get() == "parcel of 7, announced"
    assert store().completed_steps(task.id) == ["reserve", "announce"]


def test_task_applied_by_a_task_has_its_own_run(eager: Any) -> None:
    @eager.task
    @step("charge")
    def charge(amount: int) -> str:
        return str(current_run().id)

    @eager.task
    @steps()
    def ship() -> list[str]:
        return [str(current_run().id), charge.apply((1,)).get(disable_sync_subtasks=False)]

    task = ship.delay()
    outer, inner = task.get()
    assert outer == task.id != inner


def test_step_with_two_inputs_in_one_task_is_an_error(eager: Any) -> None:
    @eager.task
    @steps()
    def ship() -> None:
        for amount in (1, 2):
            current_run().call("reserve", abs, amount)

    with pytest.raises(InputMismatchError):
        ship.delay().get()


def test_excluded_arguments_are_not_stored(eager: Any) -> None:
    @eager.task
    @step("log in", exclude=("password",))
    def log_in(name: str, password: str) -> int:
        return len(password)

    task = log_in.delay("ann", "secret")
    assert task.get() == 6
    assert store().get_step_run(task.id, "log in").input == {"name": "ann"}


class TestRunIds:
    def test_chosen_task_id_is_a_run_per_call(self, eager: Any) -> None:
        @eager.task
        @step("report")
        def report() -> str:
            return str(current_run().id)

        ids = {report.apply(task_id="nightly").get() for _ in range(2)}
        assert len(ids) == 2
        assert all(id.startswith("nightly@") for id in ids)

    def test_retry_of_a_chosen_task_id_continues_the_run(self, eager: Any) -> None:
        ids: list[str | None] = []

        @eager.task(bind=True)
        @steps()
        def report(self: Any) -> int:
            ids.append(current_run().id)
            current_run().call("reserve", abs, -1)
            if self.request.retries < 2:
                raise self.retry()
            return int(self.request.retries)

        assert report.apply(task_id="nightly").get() == 2
        assert len(ids) == 3
        assert len(set(ids)) == 1

    @pytest.mark.parametrize("properties", [None, {"delivery_tag": 1}, {"delivery_tag": "a receipt of SQS"}])
    def test_chosen_task_id_needs_messages_with_an_id(self, eager: Any, properties: dict[str, Any] | None) -> None:
        task = eager.task(work)
        task.push_request(id="nightly", called_directly=False, properties=properties)
        with pytest.raises(InvalidArgumentError, match="you have chosen the task id 'nightly'.* run_id"):
            default_run_id(task)

    def test_chosen_task_id_is_told_apart_by_the_message(self, eager: Any) -> None:
        tag = "5f0c4f0e-7d5c-4c39-9d6a-3d1f0f6f2a01"
        task = eager.task(work)
        task.push_request(id="nightly", called_directly=False, properties={"delivery_tag": tag})
        assert default_run_id(task) == f"nightly@{tag}"
        assert task.request.headers == {"squidstep_redis": {"run_id": f"nightly@{tag}"}}


class TestFailures:
    @pytest.mark.parametrize("wrap", [lambda fn: fn, wrapped])
    def test_permanent_failure_stops_autoretry(self, eager: Any, wrap: Callable[..., Any]) -> None:
        calls: list[int] = []

        @eager.task(autoretry_for=(Exception,), max_retries=3)
        @wrap
        @step("charge")
        def charge(amount: int) -> None:
            calls.append(amount)
            raise PermanentError("no such card")

        result = charge.apply((7,))
        assert (result.state, calls) == ("FAILURE", [7])
        assert isinstance(result.result, PermanentError)

    def test_invalid_result_stops_autoretry(self, eager: Any) -> None:
        calls: list[int] = []

        @eager.task(autoretry_for=(Exception,), max_retries=3)
        @steps()
        def make() -> object:
            calls.append(1)
            return current_run().call("make", object)

        with pytest.raises(InvalidArgumentError):
            make.delay().get()
        assert calls == [1]

    @pytest.mark.parametrize("decorate", [step("charge", run_id="order"), steps(run_id="order")], ids=["step", "steps"])
    def test_plain_function_that_returns_a_coroutine_is_rejected(self, eager: Any, decorate: Any) -> None:
        async def charge_asyncio() -> None:
            raise NotImplementedError

        def charge() -> Any:
            return charge_asyncio()

        with pytest.raises(InvalidArgumentError, match="charge at .* is not a coroutine function, but"):
            eager.task(decorate(charge)).delay().get()

    def test_step_within_itself_stops_autoretry(self, eager: Any) -> None:
        calls: list[int] = []

        @eager.task(autoretry_for=(Exception,), max_retries=9, default_retry_delay=0)
        @step("charge", run_id="order")
        def charge() -> Any:
            calls.append(1)
            return charge()

        with pytest.raises(InvalidArgumentError, match="this code itself is executing step 'charge' of run 'order'"):
            charge.delay().get()
        assert calls == [1]

    def test_exhausted_step_stops_autoretry(self, eager: Any) -> None:
        calls: list[int] = []

        @eager.task(autoretry_for=(Exception,), max_retries=9, default_retry_delay=0)
        @step("charge", max_attempts=2)
        def charge() -> None:
            calls.append(1)
            raise OSError("no route")

        result = charge.apply()
        assert (result.state, len(calls)) == ("FAILURE", 2)
        assert isinstance(result.result, StepExhaustedError)

    def test_step_errors_from_a_result_backend_can_be_printed(self, eager: Any) -> None:
        @eager.task
        @step("charge", run_id="order")
        def charge() -> None:
            raise PermanentError("no such card")

        charge.apply()
        result = charge.apply()
        assert isinstance(result.result, StepFailedError)
        backend = eager.backend
        returned = backend.exception_to_python(backend.prepare_exception(result.result, "json"))
        assert isinstance(returned, StepFailedError)
        assert "'order'" in str(returned)


class TestBusySteps:
    @pytest.fixture
    def charge(self, eager: Any) -> Callable[..., Any]:
        store().begin_step("order", "charge", {}, lease=600)

        def charge() -> None:
            raise AssertionError

        return charge

    def test_eager_task_raises_the_error(self, eager: Any, charge: Callable[..., Any]) -> None:
        task = eager.task(step("charge", run_id="order")(charge))
        with pytest.raises(StepBusyError) as caught:
            task.delay().get()
        assert caught.value.__notes__ == ["The task was not retried: it was called by apply(), which would not wait."]

    def test_on_busy_raise_raises_the_error(self, eager: Any, charge: Callable[..., Any]) -> None:
        task = eager.task(step("charge", run_id="order", on_busy="raise")(charge))
        with pytest.raises(StepBusyError) as caught:
            task.delay().get()
        assert not hasattr(caught.value, "__notes__")

    def test_retry_later_of_an_eager_task_is_raised(self, eager: Any) -> None:
        @eager.task
        @step("charge")
        def charge() -> None:
            raise RetryLater(600)

        with pytest.raises(RetryLater):
            charge.delay().get()


@pytest.mark.parametrize("decorator", [functools.partial(step, "charge"), steps])
@pytest.mark.parametrize(
    "options", [{"on_busy": "retry"}, {"lease": 0}, {"max_attempts": 0}, {"run_id": "{amount}"}, {"run_id": "{self}"}]
)
def test_decorators_reject_invalid_settings(decorator: Callable[..., Any], options: dict[str, Any]) -> None:
    def charge(self: Any) -> None: ...

    with pytest.raises(InvalidArgumentError):
        decorator(**options)(charge)


@pytest.mark.parametrize("decorator", [step("charge"), steps()])
def test_coroutine_functions_are_rejected(decorator: Callable[..., Any]) -> None:
    async def charge() -> None: ...

    class Charge:
        async def __call__(self) -> None: ...

    for fn in (charge, Charge()):
        with pytest.raises(InvalidArgumentError, match="coroutine function"):
            decorator(fn)


@pytest.mark.parametrize("kind", ["step", "steps", "current_run"])
def test_task_labels_its_run(eager: Any, kind: str) -> None:
    @step("ship", labels={"tenant": "{tenant}"} if kind == "step" else None)
    def ship(tenant: str, amount: int) -> int:
        return amount

    def in_run(tenant: str, amount: int) -> tuple[str, int]:
        run = current_run(labels={"tenant": tenant}) if kind == "current_run" else current_run()
        assert run.id is not None
        return run.id, run.call("first", lambda amount: amount, amount) + ship(tenant, amount)

    @eager.task
    def alone(tenant: str, amount: int) -> tuple[str, int]:
        return str(current_run().id), ship(tenant, amount) * 2

    decorated = steps(labels={"tenant": "{tenant}"})(in_run) if kind == "steps" else in_run
    task = alone if kind == "step" else eager.task(decorated)
    run_id, amount = task.delay("acme", 7).get()

    assert amount == 14
    summary = store().summarize_run(run_id)
    assert summary is not None
    assert summary.labels == {"tenant": "acme"}
