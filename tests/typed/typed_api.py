"""The types of the public API, as a type checker sees them. Never executed: pyright checks this file."""

from __future__ import annotations

import asyncio
import enum
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, assert_type

from squidstep_redis import (
    AsyncClaim,
    AsyncStepRunStore,
    Attempt,
    BeginResult,
    Call,
    Claim,
    ClaimCounts,
    Queued,
    RunCancelledError,
    RunExplanation,
    RunPage,
    RunSummary,
    ScheduleResult,
    StepBusyError,
    StepExhaustedError,
    StepExplanation,
    StepPage,
    StepRun,
    StepRunList,
    StepRunStore,
    StepStatus,
    StoreOverview,
    current_claim,
)


class Step(enum.Enum):
    PAY = "pay"


def blocking_store(store: StepRunStore) -> None:
    result = store.begin_step("run", Step.PAY, {"amount": 1}, lease=30, max_attempts=3, owner="worker")
    assert_type(result, BeginResult)
    step_run, decision = result
    assert_type(step_run, StepRun)
    assert_type(decision, Literal["execute", "skip"])
    assert_type(result.retry_in, float | None)
    assert_type(store.schedule_step("run", "pay", {}, fingerprint=True), ScheduleResult)
    store.begin_step("run", "pay", {}, fingerprint=lambda given: given["amount"])
    assert_type(store.complete_step(step_run, {}, schedule={"ship": {}, "mail": {"to": "a"}}), StepRun)
    assert_type(store.complete_step(step_run.id, {}, schedule={Step.PAY: {}}), StepRun)
    successors: dict[str, dict[str, int]] = {"ship": {"parcels": 2}}
    assert_type(store.complete_step(step_run, {}, schedule=successors), StepRun)
    assert_type(store.begin_steps("run", {Step.PAY: {}, "ship": {}}, lease=30), dict[str, BeginResult])
    assert_type(store.complete_steps([(step_run, {}), (step_run.id, {})]), list[StepRun | Exception])
    assert_type(store.fail_step(step_run, ValueError("no")), StepRun)
    assert_type(store.schedule_steps("run", {Step.PAY: {}}), list[str])
    assert_type(store.get_step_run("run", "pay"), StepRun | None)
    assert_type(store.step_statuses("run"), dict[str, StepStatus])
    assert_type(store.completed_outputs("run", after=10, limit=10), list[dict[str, Any]])
    assert_type(store.scan_steps("run", limit=10), StepPage)
    assert_type(store.attempts("run", "pay"), list[Attempt])
    assert_type(store.lapsed_claims(limit=10, step=Step.PAY, cursor=""), StepRunList)
    assert_type(store.live_claims(10, owner="worker"), StepRunList)
    assert_type(store.expire_claim(step_run.id), StepRun)
    assert_type(store.delete_run("run"), bool)
    assert_type(store.retry_step("run", Step.PAY, owner="me"), StepRun)
    assert_type(store.retry_run("run"), list[StepRun])
    assert_type(store.runs(status=StepStatus.FAILED, limit=10), RunPage)
    assert_type(store.runs(status="failed").runs, list[RunSummary])
    assert_type(store.purge(timedelta(days=90), dry_run=True), list[RunSummary])
    assert_type(store.import_run(store.export_run("run")), str)
    assert_type(store.fork_run("run", "new", through=Step.PAY), list[str])
    assert_type(store.advance_step(step_run, {}, Step.PAY, {}, lease=30), BeginResult)
    assert_type(store.release_step(step_run), StepRun)
    assert_type(store.extend_claim(step_run, timedelta(seconds=30), progress={"page": 1}), StepRun)
    assert_type(store.checkpoint_step(step_run, {"page": 1}), StepRun)
    assert_type(store.delete_pending_steps("run", [Step.PAY]), list[str])
    assert_type(store.get_run("run"), list[StepRun])
    assert_type(store.completed_steps("run"), list[str])
    assert_type(store.wait_for_step("run", Step.PAY, timeout=10), StepRun)
    assert_type(store.count_claims(), ClaimCounts)
    assert_type(store.expire_run("run", timedelta(days=1)), bool)
    assert_type(store.cancel_run("run", "wrong address"), bool)
    assert_type(store.resume_run("run"), bool)
    assert_type(store.summarize_run("run"), RunSummary | None)
    assert_type(step_run.cancel_reason, str | None)
    assert_type(result.cancelled, bool)
    assert_type(step_run.input, dict[str, Any])
    assert_type(step_run.output, dict[str, Any] | None)
    assert_type(step_run.progress, dict[str, Any] | None)


def operating(store: StepRunStore) -> None:
    assert_type(store.explain_step("run", Step.PAY), StepExplanation | None)
    assert_type(store.explain_run("run", limit=5), RunExplanation | None)
    assert_type(store.count_failed(), int)
    assert_type(store.overview(5), StoreOverview)


def charge(input: dict[str, Any]) -> dict[str, int]:
    return {"charged": input["amount"]}


def run_step_and_claim_step(store: StepRunStore) -> None:
    assert_type(store.run_step("run", Step.PAY, charge, {"amount": 1}), dict[str, Any])
    options = store.run_step(
        "run", "pay", lambda _: {}, {}, lease=timedelta(minutes=1), max_attempts=3, on_busy="wait", owner="worker"
    )
    assert_type(options, dict[str, Any])
    with store.claim_step("run", "pay", {}, lease=None, on_busy="raise") as claim:
        assert_type(claim, Claim)
        assert_type(claim.decision, Literal["execute", "skip"] | None)
        assert_type(claim.input, dict[str, Any])
        assert_type(claim.output, dict[str, Any] | None)
        assert_type(claim.step_run, StepRun)
        assert_type(claim.progress, dict[str, Any] | None)
        claim.checkpoint({"page": 1}, lazy=True)
        assert_type(claim.lost, threading.Event)
        assert_type(claim.cancelled, threading.Event)
        assert_type(claim.cancellation, RunCancelledError | None)
        assert_type(claim.lease_left, float)
        assert_type(claim.ended, bool)
        assert_type(claim.queue_completion(object(), {}, schedule={Step.PAY: {}}), Queued[StepRun])
        assert_type(claim.complete({}, schedule={Step.PAY: {}}), StepRun)
        assert_type(claim.fail(ValueError("no")), StepRun)
        assert_type(claim.release(), StepRun)
    current = current_claim()
    if current is not None:
        assert_type(current.lost.is_set(), bool)
        assert_type(current.step_run, StepRun)


def errors(busy: StepBusyError, exhausted: StepExhaustedError) -> None:
    assert_type(busy.retry_in, float | None)
    assert_type(busy.current, StepRun)
    assert_type(exhausted.current.last_error, dict[str, Any] | None)


def calls_and_batches(store: StepRunStore) -> None:
    begin = store.calls.begin_step("run", "pay", {})
    assert_type(begin, Call[BeginResult])
    assert_type(store.send(begin), BeginResult)
    assert_type(store.batch([begin, begin]), list[BeginResult | Exception])
    assert_type(store.batch([begin, begin], raise_errors=True), list[BeginResult])
    assert_type(store.queue(object(), begin).result([]), BeginResult)


def labels(store: StepRunStore) -> None:
    assert_type(store.runs(labels={"tenant": "acme"}).runs[0].labels, Mapping[str, str])
    assert_type(store.count_runs(labels={"tenant": "acme"}), int)


async def asyncio_store(store: AsyncStepRunStore) -> None:
    result = await store.begin_step("run", "pay", {}, lease=30)
    assert_type(result, BeginResult)
    assert_type(await store.complete_step(result.step_run, {}), StepRun)
    failed = await store.failed_steps()
    assert_type(failed[0], StepRun)
    assert_type(failed.cursor, str | None)
    begin = store.calls.begin_step("run", "pay", {})
    assert_type(await store.batch([begin]), list[BeginResult | Exception])
    assert_type(await store.batch([begin], raise_errors=True), list[BeginResult])
    assert_type(await store.runs(), RunPage)
    async with AsyncStepRunStore.from_url("redis://localhost") as own:
        assert_type(own, AsyncStepRunStore)


async def charge_later(input: dict[str, Any]) -> dict[str, int]:
    return {"charged": input["amount"]}


async def asyncio_run_step_and_claim_step(store: AsyncStepRunStore) -> None:
    assert_type(await store.run_step("run", Step.PAY, charge, {"amount": 1}, on_busy="wait"), dict[str, Any])
    assert_type(await store.run_step("run", "pay", charge_later, {}, cancel_when_lost=True), dict[str, Any])
    assert_type(await store.run_step("run", "pay", charge_later, {}, cancel_with_run=True), dict[str, Any])
    async with store.claim_step("run", "pay", {}, cancel_when_lost=True) as claim:
        assert_type(claim, AsyncClaim)
        assert_type(claim.lost, asyncio.Event)
        assert_type(claim.cancelled, asyncio.Event)
        await claim.checkpoint({"page": 1}, lazy=True)
        assert_type(await claim.complete({}, schedule={"mail": {"to": "a"}}), StepRun)
        assert_type(await claim.fail({"reason": "declined"}), StepRun)
        assert_type(await claim.release(), StepRun)


def mistakes_are_reported(store: StepRunStore, step_run: StepRun) -> None:
    store.begin_step("run", "pay")  # pyright: ignore[reportCallIssue]: missing input
    store.begin_step("run", "pay", {}, leese=30)  # pyright: ignore[reportCallIssue]: unknown argument
    store.begin_step("run", "pay", {}, lease="30")  # pyright: ignore[reportArgumentType]: not seconds
    store.begin_step(7, "pay", {})  # pyright: ignore[reportArgumentType]: not a run id
    store.run_step("run", "pay", charge_later, {})  # pyright: ignore[reportArgumentType]: a coroutine function needs the asyncio store
    store.run_step("run", "pay", charge, {}, on_busy="skip")  # pyright: ignore[reportArgumentType]: neither "raise" nor "wait"
    store.claim_step("run", "pay", {}, leas=30)  # pyright: ignore[reportCallIssue]: no such setting
    store.run_step("run", "pay", charge, {}, lease="30")  # pyright: ignore[reportArgumentType]: not seconds
    store.claim_step("run", "pay", {}, cancel_when_lost=True)  # pyright: ignore[reportCallIssue]: asyncio only
    store.complete_step(None, {})  # pyright: ignore[reportArgumentType]: neither a step run nor an id
    step_run.status = StepStatus.FAILED  # pyright: ignore[reportAttributeAccessIssue]: a snapshot is read-only


def mixed_batch(store: StepRunStore, claim: StepRun) -> None:
    calls = [store.calls.complete_step(claim, {}), store.calls.completed_steps("run")]
    assert_type(store.batch(calls), list[StepRun | list[str] | Exception])
    mixed = store.batch([*calls, store.calls.begin_step("run", "step", {})])
    assert_type(mixed, list[StepRun | list[str] | BeginResult | Exception])  # to mypy: list[Any]
    assert_type(store.batch(calls, raise_errors=True), list[StepRun | list[str]])
