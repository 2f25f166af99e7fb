"""Mistakes that can be detected when a function is decorated are rejected then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from enum import Enum
from functools import partial
from typing import Any

import pytest
import redis
import redis.asyncio

from squidstep_redis import AsyncStepRunStore, ExponentialBackoff, InvalidArgumentError, StepRunStore
from squidstep_redis.rq import step, steps

BLOCKING = StepRunStore(redis.Redis())
ASYNCIO = AsyncStepRunStore(redis.asyncio.Redis())


def pay(order_id: int, *, region: str = "eu", note: str | None = None) -> int:
    raise NotImplementedError


async def pay_asyncio(order_id: int, *, region: str = "eu", note: str | None = None) -> int:
    raise NotImplementedError


def pay_all(order_id: int, *more: int, **others: int) -> int:
    raise NotImplementedError


def pay_each(order_id: int) -> Iterator[int]:
    yield order_id


async def pay_each_asyncio(order_id: int) -> AsyncIterator[int]:
    yield order_id


async def run_id_asyncio(order_id: int, **others: Any) -> str:
    raise NotImplementedError


class Names(Enum):
    PAY = "pay"


def of_step(fn: Callable[..., Any] = pay, **options: Any) -> Any:
    return step("pay", **options)(fn)


def of_steps(fn: Callable[..., Any] = pay, **options: Any) -> Any:
    return steps(**options)(fn)


def of_store(fn: Callable[..., Any] = pay, *, run_id: Any = "run", **options: Any) -> Any:
    return BLOCKING.step("pay", run_id=run_id, **options)(fn)


def of_asyncio_store(fn: Callable[..., Any] = pay_asyncio, *, run_id: Any = "run", **options: Any) -> Any:
    return ASYNCIO.step("pay", run_id=run_id, **options)(fn)


each_decorator = pytest.mark.parametrize("decorate", [of_step, of_steps, of_store, of_asyncio_store])
of_plain_functions = pytest.mark.parametrize("decorate", [of_step, of_steps, of_store])
of_stores = pytest.mark.parametrize("store", [BLOCKING, ASYNCIO])


@pytest.mark.parametrize("name", [pay, pay_asyncio, "", "p" * 513, "\ud800", b"pay", None, 7, Names])
def test_wrong_step_name_is_rejected(name: Any) -> None:
    for of_name in (step, partial(BLOCKING.step, run_id="run"), partial(ASYNCIO.step, run_id="run")):
        with pytest.raises(InvalidArgumentError, match="^step: "):
            of_name(name)


def test_decorator_without_parentheses_is_rejected() -> None:
    for of_name in (step, BLOCKING.step, ASYNCIO.step):
        with pytest.raises(InvalidArgumentError, match=r'a step needs a name, as in @step\("charge"\)'):
            of_name(pay)
    with pytest.raises(TypeError):
        steps(pay)
    with pytest.raises(TypeError, match="run_id"):
        BLOCKING.step("pay")


@each_decorator
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("lease", value) for value in (0, -1, float("nan"), True, "30", timedelta(0), timedelta(days=400))],
        *[("max_attempts", value) for value in (0, -1, 1.5, True, "3", 10_000_000)],
        *[("backoff", value) for value in (60, lambda: 60, lambda attempt, error: 60)],
        *[("fingerprint", value) for value in (7, "", lambda: "x", lambda order_id, region: order_id)],
        *[("permanent", value) for value in (ValueError("x"), [ValueError], (int,))],
        ("on_busy", "skip"),
        *[("run_id", value) for value in (7, b"order", lambda: "x", lambda a, b: "x", lambda order_id: "x")],
        ("run_id", run_id_asyncio),
        ("run_id", ""),
        *[("exclude", value) for value in ("note", ["note"], (7,), None)],
        *[("run_id", value) for value in ("{}", "{0}", "{order}", "{order_id", "{order_id!x}", "{order_id:{width}}")],
        *[("run_id", value) for value in ("{order_id[}", "{order_id.}", "{note}", "{order_id}-{note}")],
    ],
)
def test_wrong_argument_is_rejected_when_decorating(decorate: Callable[..., Any], argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decorate(**{argument: value})
    assert caught.value.argument == argument


@each_decorator
def test_excluded_argument_cannot_be_in_the_run_id(decorate: Callable[..., Any]) -> None:
    for run_id in ("{region}", "{order_id}-{region.name}", "{order_id:{region}}"):
        with pytest.raises(InvalidArgumentError, match="^run_id: .*'region', which is excluded"):
            decorate(run_id=run_id, exclude=("region",))
    assert decorate(run_id=lambda order_id, *, region, note: region, exclude=("region",))


@pytest.mark.parametrize("decorate", [of_step, of_store, of_asyncio_store])
def test_excluded_name_that_is_not_a_parameter_is_rejected(decorate: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="^exclude: names 'regoin', which is not a parameter of"):
        decorate(exclude=("note", "regoin"))


def test_excluded_name_may_be_any_if_the_function_accepts_any() -> None:
    assert of_store(pay_all, exclude=("password",)).__wrapped__ is pay_all


@of_stores
def test_settings_of_a_store_are_checked(store: Any) -> None:
    for owner in ("", 7, "a\nb", "o" * 257):
        with pytest.raises(InvalidArgumentError, match="^owner: "):
            store.step("pay", run_id="run", owner=owner)
    for argument, value in (("lease", 0), ("backoff", lambda: 60), ("on_busy", "reschedule"), ("exclude", "note")):
        with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
            store.run("run", **{argument: value})
    for run_id in (None, "", 7, "r" * 513):
        with pytest.raises(InvalidArgumentError, match="^run_id: "):
            store.run(run_id)


def test_step_of_a_store_needs_a_run_id() -> None:
    for decorate in (of_store, of_asyncio_store):
        with pytest.raises(InvalidArgumentError, match="^run_id: must be a format string over the arguments, or a fun"):
            decorate(run_id=None)


class Awaitable:
    async def __call__(self, order_id: int) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("fn", [pay_asyncio, partial(pay_asyncio, 7), Awaitable(), partial(Awaitable(), 7)])
def test_coroutine_function_needs_an_asyncio_store(fn: Any) -> None:
    assert of_asyncio_store(fn)
    with pytest.raises(InvalidArgumentError, match="is a coroutine function: use an AsyncStepRunStore"):
        of_store(fn)
    with pytest.raises(InvalidArgumentError, match="is a coroutine function: use an AsyncStepRunStore"):
        BLOCKING.run("run").call("pay", fn)


class Yielding:
    def __call__(self, order_id: int) -> Iterator[int]:
        yield order_id


@pytest.mark.parametrize("decorate", [of_store, of_asyncio_store])
@pytest.mark.parametrize("fn", [Yielding(), partial(Yielding(), 7)])
def test_object_whose_call_is_a_generator_is_rejected(decorate: Callable[..., Any], fn: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="is a generator function"):
        decorate(fn)


@pytest.mark.parametrize("fn", [pay, partial(pay, 7), Names])
def test_plain_function_needs_a_blocking_store(fn: Any) -> None:
    assert of_store(fn)
    with pytest.raises(InvalidArgumentError, match="is not a coroutine function: use a StepRunStore"):
        of_asyncio_store(fn)
    with pytest.raises(InvalidArgumentError, match="is not a coroutine function: use a StepRunStore"):
        asyncio.run(ASYNCIO.run("run").call("pay", fn, 7))


@each_decorator
@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_order_of_decorators_is_named(decorate: Callable[..., Any], kind: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^fn: must be a function: put .* under @{kind.__name__}"):
        decorate(kind(pay))


@each_decorator
@pytest.mark.parametrize("fn", [7, pay_each, pay_each_asyncio, partial(pay_each, 7), classmethod(pay)])
def test_value_that_is_not_a_function_is_rejected(decorate: Callable[..., Any], fn: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="^fn: "):
        decorate(fn)


@each_decorator
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lease", None),
        ("lease", timedelta(seconds=30)),
        ("max_attempts", 1),
        ("backoff", ExponentialBackoff()),
        ("fingerprint", lambda given: given["order_id"]),
        ("run_id", "order-{order_id:05}-{region!r}"),
        ("run_id", "order-{order_id.number[7]:{region}}"),
        ("run_id", lambda order_id, region, note: "x"),
        ("run_id", lambda order_id, **others: "x"),
        ("run_id", lambda *args, **kwargs: "x"),
        ("run_id", lambda order_id, *, region, note: "x"),
        ("exclude", ("region", "note")),
    ],
)
def test_right_argument_is_accepted(decorate: Callable[..., Any], argument: str, value: Any) -> None:
    assert decorate(**{argument: value}).__wrapped__ in (pay, pay_asyncio)


@of_plain_functions
def test_run_id_function_accepts_all_that_its_function_accepts(decorate: Callable[..., Any]) -> None:
    assert decorate(pay_all, run_id=lambda order_id, *more, **others: "x").__wrapped__ is pay_all
    for run_id in (lambda order_id: "x", lambda order_id, *more: "x", lambda order_id, **others: "x"):
        with pytest.raises(InvalidArgumentError, match="^run_id: its function "):
            decorate(pay_all, run_id=run_id)


def test_run_id_of_none_is_rejected_at_the_call() -> None:
    for run_id in ("order-{order_id}", "order-{order_id!s:>5}", "order-{order_id[number]}"):
        given = {"number": None} if "[" in run_id else None
        for call in (of_step(run_id=run_id), of_store(run_id=run_id)):
            with pytest.raises(InvalidArgumentError, match="^run_id: is made from an argument that is None"):
                call(given)
        with pytest.raises(InvalidArgumentError, match="^run_id: is made from an argument that is None"):
            asyncio.run(of_asyncio_store(run_id=run_id)(given))
    with pytest.raises(InvalidArgumentError, match="^run_id: must be a non-empty str, but its function returned None"):
        of_store(run_id=lambda order_id, *, region, note: note)(7)
