"""Labels of runs: which call sets them, what is rejected, and what copies of a run keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun

from squidstep_redis import InvalidArgumentError, StepRunStore

LABELS = {"tenant": "acme", "order": "7301"}

CREATE: dict[str, Callable[[StepRunStore, Any], object]] = {
    "begin_step": lambda store, labels: store.begin_step("run", "step", {}, labels=labels),
    "begin_steps": lambda store, labels: store.begin_steps("run", {"step": {}, "next": {}}, labels=labels),
    "schedule_step": lambda store, labels: store.schedule_step("run", "step", {}, labels=labels),
    "schedule_steps": lambda store, labels: store.schedule_steps("run", {"step": {}}, labels=labels),
    "run_step": lambda store, labels: store.run_step("run", "step", lambda _: {}, {}, labels=labels),
}


def labels_of(store: StepRunStore, run_id: str = "run") -> Mapping[str, str]:
    summary = store.summarize_run(run_id)
    assert summary is not None
    return summary.labels


@pytest.mark.parametrize("settings", [{}, {"run_ttl": 600}, {"fingerprint": True}], ids=str)
@pytest.mark.parametrize("call", CREATE)
def test_call_that_creates_a_run_sets_its_labels(bench: Bench, call: str, settings: dict[str, Any]) -> None:
    store = bench.store(**settings)
    CREATE[call](store, LABELS)

    assert labels_of(store) == LABELS
    assert bench.field("run", "l") == b"order=7301\ntenant=acme"
    assert (bench.backend.raw.pttl(bench.keys("run")[0]) > 0) is (
        "run_ttl" in settings and call in ("schedule_step", "schedule_steps", "run_step")
    )


@pytest.mark.parametrize("call", CREATE)
@pytest.mark.parametrize("first", [None, {"tenant": "first"}])
def test_later_calls_do_not_change_them(store: StepRunStore, call: str, first: dict[str, str] | None) -> None:
    store.schedule_step("run", "before", {}, labels=first)

    CREATE[call](store, LABELS)

    assert labels_of(store) == (first or {})


def test_group_of_begun_steps_creates_a_run_with_labels(store: StepRunStore) -> None:
    store.batch([store.calls.begin_step("run", f"step-{n}", {}, lease=60, labels=LABELS) for n in range(3)])

    assert labels_of(store) == LABELS
    assert len(store.live_claims()) == 3


def test_copies_of_a_run_keep_its_labels(bench: Bench, store: StepRunStore) -> None:
    store.complete_step(begun(store.begin_step("run", "step", {}, labels=LABELS)), {})
    store.fork_run("run", "fork")
    document = store.export_run("run")
    other = bench.store(prefix=f"{bench.prefix}-other")
    other.import_run(document)

    assert document["labels"] == LABELS
    assert labels_of(store, "fork") == labels_of(other) == LABELS


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("tenant", "must be a dict"),
        ([("tenant", "acme")], "must be a dict"),
        ({f"name{n}": "x" for n in range(9)}, "at most 8"),
        ({"": "x"}, "a name must be"),
        ({"1st": "x"}, "a name must be"),
        ({"a b": "x"}, "a name must be"),
        ({"a=b": "x"}, "a name must be"),
        ({"ä": "x"}, "a name must be"),
        ({"n" * 33: "x"}, "a name must be"),
        ({7: "x"}, "a name must be"),
        ({"tenant": ""}, r"\['tenant'\]: must be 1 to 64 bytes"),
        ({"tenant": "x" * 65}, r"\['tenant'\]: must be 1 to 64 bytes"),
        ({"tenant": "é" * 33}, r"\['tenant'\]: must be 1 to 64 bytes"),
        ({"tenant": 7}, r"\['tenant'\]: must be a non-empty str"),
        ({"tenant": None}, r"\['tenant'\]: must be a non-empty str"),
        ({"tenant": "a\nb"}, r"\['tenant'\]: must not contain control characters"),
        ({"tenant": "\x1b[31m"}, r"\['tenant'\]: must not contain control characters"),
        ({"tenant": "\ud800"}, r"\['tenant'\]: has a lone surrogate"),
    ],
)
def test_other_labels_are_rejected_before_anything_is_sent(
    bench: Bench, store: StepRunStore, labels: Any, problem: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^labels.*{problem}"):
        store.begin_step("run", "step", {}, labels=labels)
    assert bench.dump() == {}


@pytest.mark.parametrize("call", CREATE)
def test_each_call_checks_the_labels(bench: Bench, store: StepRunStore, call: str) -> None:
    with pytest.raises(InvalidArgumentError, match="^labels"):
        CREATE[call](store, {"tenant": ""})
    assert bench.dump() == {}


def test_document_with_other_labels_is_rejected(store: StepRunStore) -> None:
    store.schedule_step("run", "step", {})
    document = {**store.export_run("run"), "run_id": "new", "labels": {"a b": "x"}}

    with pytest.raises(InvalidArgumentError, match=r"document\['labels'\]: a name must be"):
        store.import_run(document)


def test_document_without_labels_is_imported(store: StepRunStore) -> None:
    store.schedule_step("run", "step", {})
    document = {**store.export_run("run"), "run_id": "new"}
    del document["labels"]

    store.import_run(document)

    assert labels_of(store, "new") == {}
