"""Labels that decorators make from the arguments of a call: `store.step`, `store.run`, RQ and Celery."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import redis
from rq import Queue
from support import rq_input_jobs
from support.backends import Bench
from support.rq_harness import RQ_MARKS, Harness, result_of

import squidstep_redis.rq
from squidstep_redis import InvalidArgumentError, StepRunStore
from squidstep_redis.celery import current_run, step, steps, store

pytest_plugins = ["support.rq_fixtures", "support.celery_fixtures"]

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
            bench.runner.run(result)  # type: ignore[arg-type] -- it is a coroutine

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
                bench.runner.run(result)  # type: ignore[arg-type] -- it is a coroutine

        assert labels_of(store, "run") == {"tenant": "acme"}


DECORATORS: dict[str, Callable[..., Any]] = {
    "store": lambda **options: NOWHERE.step("ship", run_id="run", **options),
    "rq step": lambda **options: squidstep_redis.rq.step("ship", **options),
    "rq steps": squidstep_redis.rq.steps,
    "celery step": lambda **options: step("ship", **options),
    "celery steps": steps,
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
        (lambda tenant: {}, "labels: "),  # type: ignore[misc] -- it lacks parameters
    ],
)
def test_mistakes_are_rejected_when_the_function_is_decorated(decorator: str, labels: Any, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{problem}"):
        DECORATORS[decorator](labels=labels, exclude=("password",))(ship)


class TestRq:
    pytestmark = RQ_MARKS

    @pytest.mark.parametrize("job", ["ship_labelled", "ship_in_labelled_run", "ship_in_current_run"])
    def test_job_labels_its_run(self, harness: Harness, queue: Queue, job: str) -> None:
        enqueued = queue.enqueue(getattr(rq_input_jobs, job), "acme", 7)

        assert result_of(enqueued) == 7
        assert labels_of(StepRunStore(queue.connection), enqueued.id) == {"tenant": "acme"}


class TestCelery:
    @pytest.mark.parametrize("kind", ["step", "steps", "current_run"])
    def test_task_labels_its_run(self, eager: Any, kind: str) -> None:
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
        assert labels_of(store(), run_id) == {"tenant": "acme"}
