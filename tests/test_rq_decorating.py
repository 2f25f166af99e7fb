"""Mistakes that can be seen when a function is decorated are rejected there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from enum import Enum
from functools import partial
from typing import Any

import pytest

from squidstep_redis import ExponentialBackoff, InvalidArgumentError
from squidstep_redis.rq import step, steps


def pay(order_id: int, *, region: str = "eu", note: str | None = None) -> int:
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


each_decorator = pytest.mark.parametrize("decorate", [of_step, of_steps])


@pytest.mark.parametrize("name", [pay, "", "p" * 513, "\ud800", b"pay", None, 7, Names])
def test_wrong_step_name_is_rejected(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="^step: "):
        step(name)


def test_decorator_without_parentheses_is_rejected() -> None:
    with pytest.raises(InvalidArgumentError, match="a step needs a name"):
        step(pay)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        steps(pay)  # type: ignore[call-arg]


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
        *[("run_id", value) for value in ("{}", "{0}", "{order}", "{order_id", "{order_id!x}", "{order_id:{width}}")],
        *[("run_id", value) for value in ("{order_id[}", "{order_id.}", "{note}", "{order_id}-{note}")],
    ],
)
def test_wrong_argument_is_rejected_when_decorating(decorate: Callable[..., Any], argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decorate(**{argument: value})
    assert caught.value.argument == argument


@each_decorator
@pytest.mark.parametrize("fn", [7, pay_each, pay_each_asyncio, partial(pay_each, 7), classmethod(pay)])
def test_what_is_no_function_is_rejected(decorate: Callable[..., Any], fn: Any) -> None:
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
    ],
)
def test_right_argument_is_accepted(decorate: Callable[..., Any], argument: str, value: Any) -> None:
    assert decorate(**{argument: value}).__wrapped__ is pay


@each_decorator
def test_run_id_function_accepts_all_that_its_function_accepts(decorate: Callable[..., Any]) -> None:
    assert decorate(pay_all, run_id=lambda order_id, *more, **others: "x").__wrapped__ is pay_all
    for run_id in (lambda order_id: "x", lambda order_id, *more: "x", lambda order_id, **others: "x"):
        with pytest.raises(InvalidArgumentError, match="^run_id: its function "):
            decorate(pay_all, run_id=run_id)


def test_run_id_of_none_is_rejected_at_the_call() -> None:
    for run_id in ("order-{order_id}", "order-{order_id!s:>5}", "order-{order_id[number]}"):
        with pytest.raises(InvalidArgumentError, match="^run_id: is made of an argument that is None"):
            of_step(run_id=run_id)({"number": None} if "[" in run_id else None)
