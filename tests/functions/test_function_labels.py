"""Labels that decorators make from the arguments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import redis
from support.backends import Bench

import squidstep_redis.celery
import squidstep_redis.rq
from squidstep_redis import InvalidArgumentError, StepRunStore

NOWHERE = StepRunStore(redis.Redis())
FORMATS = {"tenant": "{tenant}", "kind": "order", "first": "{items[0]}"}


def ship(tenant: str | None, items: list[int], password: str = "", note: str | None = None) -> int:
    return len(items)


async def ship_asyncio(tenant: str | None, items: list[int], password: str = "", note: str | None = None) -> int:
    return len(items)


def labels_of(store: StepRunStore, run_id: str) -> Mapping[str, str]:
    summary = store.summarize_run(run_id)
    assert summary is not None
    return summary.labels


@pytest.mark.servers("fakeredis", "valkey")  # every server executes the same scripts
class TestStores:
    def call(self, bench: Bench, store: StepRunStore, *args: Any, **options: Any) -> None:
        decorated = store.step("ship", run_id="run", **options)(ship if bench.runner is None else ship_asyncio)
        result: Any = decorated(*args)
        if inspect.isawaitable(result):
            assert bench.runner is not None
            bench.runner.run(result)

    def test_formats_are_filled_with_the_arguments(self, bench: Bench, store: StepRunStore) -> None:
        self.call(bench, store, "acme", [7, 8], labels=FORMATS)

        assert labels_of(store, "run") == {"tenant": "acme", "kind": "order", "first": "7"}

    def test_label_of_an_argument_that_is_none_is_omitted(self, bench: Bench, store: StepRunStore) -> None:
        self.call(bench, store, None, [7], labels={**FORMATS, "note": "{note}"})

        assert labels_of(store, "run") == {"kind": "order", "first": "7"}

    def test_function_of_the_arguments_returns_the_labels(self, bench: Bench, store: StepRunStore) -> None:
        self.call(
            bench, store, "acme", [7], labels=lambda tenant, items, password, note: {"of": f"{tenant} {len(items)}"}
        )

        assert labels_of(store, "run") == {"of": "acme 1"}

    def test_value_that_is_rejected_prevents_the_call(self, bench: Bench, store: StepRunStore) -> None:
        with pytest.raises(InvalidArgumentError, match=r"labels\['tenant'\]: must be 1 to 64 bytes"):
            self.call(bench, store, "x" * 65, [7], labels=FORMATS)

        assert bench.dump() == {}

    def test_run_gives_its_labels_to_the_first_step(self, bench: Bench, store: StepRunStore) -> None:
        run = store.run("run", labels={"tenant": "acme"})
        for step in ("ship", "again"):
            result: Any = run.call(step, ship if bench.runner is None else ship_asyncio, "acme", [7])
            if inspect.isawaitable(result):
                assert bench.runner is not None
                bench.runner.run(result)

        assert labels_of(store, "run") == {"tenant": "acme"}


DECORATORS: dict[str, Callable[..., Any]] = {
    "store": lambda **options: NOWHERE.step("ship", run_id="run", **options),
    "rq step": lambda **options: squidstep_redis.rq.step("ship", **options),
    "rq steps": squidstep_redis.rq.steps,
    "celery step": lambda **options: squidstep_redis.celery.step("ship", **options),
    "celery steps": squidstep_redis.celery.steps,
}


@pytest.mark.parametrize("decorator", DECORATORS)
@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ({"a b": "x"}, "labels: a name must be"),
        ({f"name{n}": "x" for n in range(9)}, "labels: must be at most 8"),
        ("tenant", "labels: must be a dict"),
        ({"tenant": 7}, r"labels\['tenant'\]: must be a format string"),
        ({"tenant": "{shop}"}, r"labels\['tenant'\]: .* is not a parameter"),
        ({"tenant": "{tenant"}, r"labels\['tenant'\]: .* is not a valid format string"),
        ({"of": "{password}"}, r"labels\['of'\]: .* is excluded"),
        (lambda tenant: {}, "labels: "),
    ],
)
def test_mistakes_are_rejected_when_the_function_is_decorated(decorator: str, labels: Any, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{problem}"):
        DECORATORS[decorator](labels=labels, exclude=("password",))(ship)
