"""The settings of a step: every function that accepts them shows each one, and rejects any other."""

from __future__ import annotations

import asyncio
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeRedis

from squidstep_redis import (
    AsyncRun,
    AsyncStepRunStore,
    ClaimSettings,
    FunctionSettings,
    Run,
    StepRunStore,
    StepSettings,
    celery,
    rq,
)
from squidstep_redis.claims.request import claim_request

STORES = (StepRunStore, AsyncStepRunStore)
CLAIMING = [getattr(store, name) for store in STORES for name in ("run_step", "claim_step", "step", "run")]
QUEUED = [getattr(queue, name) for queue in (rq, celery) for name in ("step", "steps", "current_run")]
ALL: list[Any] = [*CLAIMING, *QUEUED]
LOADED_LATER = {"Run": Run, "AsyncRun": AsyncRun}  # the stores import them when `run` is called


def name_of(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def settings_of(function: Any) -> type:
    if function in QUEUED:
        return StepSettings
    return FunctionSettings if function.__name__ == "step" else ClaimSettings


@pytest.mark.parametrize("function", ALL, ids=name_of)
class TestEachFunction:
    def test_signature_has_each_setting_and_its_default(self, function: Any) -> None:
        shown = inspect.signature(function).parameters
        expected = inspect.signature(claim_request).parameters
        names = settings_of(function).__annotations__
        assert {name: shown.get(name) for name in names} == {name: expected[name] for name in names}
        assert not [each for each in shown.values() if each.kind is each.VAR_KEYWORD]

    def test_docstring_describes_each_parameter_once(self, function: Any) -> None:
        doc = inspect.getdoc(function) or ""
        parameters = [name for name in inspect.signature(function).parameters if name != "self"]
        assert {name: len(re.findall(rf"^    {name}: \S", doc, re.MULTILINE)) for name in parameters} == dict.fromkeys(
            parameters, 1
        )
        assert "**settings" not in doc

    def test_annotations_can_be_evaluated(self, function: Any) -> None:
        assert typing.get_type_hints(function, localns=LOADED_LATER)["settings"] == typing.Unpack[settings_of(function)]


def test_typed_settings_are_the_parameters_of_a_claim_request() -> None:
    parameters = inspect.signature(claim_request).parameters.values()
    types = {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert {name: each.__forward_arg__ for name, each in ClaimSettings.__annotations__.items()} == types
    assert StepSettings.__annotations__.items() <= ClaimSettings.__annotations__.items()


class TestUnknownSettings:
    """The error comes at the call that has the mistake; a decorator does not wait for a function."""

    MISTAKE: dict[str, Any] = {"leas": 30}
    PROBLEM = r"unexpected keyword argument 'leas'; the settings of a step are .*\blease, max_attempts\b"

    @pytest.mark.parametrize(
        "call",
        [
            lambda store, mistake: store.run_step("run", "pay", dict, {}, **mistake),
            lambda store, mistake: store.claim_step("run", "pay", {}, **mistake),
            lambda store, mistake: store.step("pay", run_id="run", **mistake),
            lambda store, mistake: store.run("run", **mistake),
        ],
        ids=["run_step", "claim_step", "step", "run"],
    )
    def test_store_names_it(self, call: Callable[[Any, dict[str, Any]], Any]) -> None:
        with pytest.raises(TypeError, match=self.PROBLEM):
            call(StepRunStore(FakeRedis()), self.MISTAKE)

        async def call_asyncio() -> None:
            async with FakeAsyncRedis() as client:
                result = call(AsyncStepRunStore(client), self.MISTAKE)
                assert inspect.isawaitable(result), "only run_step is awaited"
                await result

        with pytest.raises(TypeError, match=self.PROBLEM):
            asyncio.run(call_asyncio())

    @pytest.mark.parametrize("queue", [rq, celery], ids=["rq", "celery"])
    def test_decorator_of_a_queue_names_it(self, queue: Any) -> None:
        for accept in (lambda **wrong: queue.step("pay", **wrong), queue.steps, queue.current_run):
            with pytest.raises(TypeError, match=self.PROBLEM):
                accept(**self.MISTAKE)
            with pytest.raises(TypeError, match="unexpected keyword argument 'owner'"):
                accept(owner="the job is the owner")

    def test_blocking_store_cancels_no_function(self) -> None:
        store: Any = StepRunStore(FakeRedis())
        for name in ("cancel_when_lost", "cancel_with_run"):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                store.step("pay", run_id="run", **{name: True})
