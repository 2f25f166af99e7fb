"""Every operation of a store, composed from one module per subject."""

from __future__ import annotations

from squidstep_redis.operations import batch as batches
from squidstep_redis.operations import (
    begin,
    explain,
    export,
    fork,
    groups,
    indexes,
    leases,
    lifecycle,
    listing,
    reads,
    repair,
    schedule,
    transitions,
    waiting,
)
from squidstep_redis.operations import overview as overviews
from squidstep_redis.operations import runs as whole_runs
from squidstep_redis.operations.context import Context


class Calls(Context):
    """Builds the call of each operation of one store, as data. A store has a method of the same name for each."""

    schedule_step = schedule.schedule_step
    schedule_steps = schedule.schedule_steps
    delete_pending_steps = schedule.delete_pending_steps

    begin_step = begin.begin_step
    begin_steps = groups.begin_steps
    complete_step = transitions.complete_step
    complete_steps = groups.complete_steps
    advance_step = begin.advance_step
    fail_step = transitions.fail_step
    checkpoint_step = leases.checkpoint_step
    extend_claim = leases.extend_claim
    expire_claim = leases.expire_claim
    release_step = transitions.release_step

    get_step_run = reads.get_step_run
    get_run = reads.get_run
    scan_steps = reads.scan_steps
    attempts = reads.attempts
    completed_steps = reads.completed_steps
    completed_outputs = reads.completed_outputs
    step_statuses = reads.step_statuses
    wait_for_step = waiting.wait_for_step

    explain_step = explain.explain_step
    explain_run = explain.explain_run

    lapsed_claims = indexes.lapsed_claims
    live_claims = indexes.live_claims
    failed_steps = indexes.failed_steps
    count_claims = indexes.count_claims
    count_failed = indexes.count_failed
    overview = overviews.overview

    expire_run = lifecycle.expire_run
    cancel_run = lifecycle.cancel_run
    resume_run = lifecycle.resume_run
    delete_run = lifecycle.delete_run
    summarize_run = whole_runs.summarize_run
    runs = listing.runs
    count_runs = listing.count_runs
    purge = whole_runs.purge

    retry_step = repair.retry_step
    retry_run = repair.retry_run
    export_run = export.export_run
    import_run = export.import_run
    fork_run = fork.fork_run

    batch = batches.batch
