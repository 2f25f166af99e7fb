"""The inputs of a job's steps: one step that is called with several inputs is a mistake in the job."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from inspect import BoundArguments

from squidstep_redis import InputMismatchError, PayloadError
from squidstep_redis.protocol.arguments import Step
from squidstep_redis.protocol.arguments import step as checked
from squidstep_redis.protocol.fingerprints import digest
from squidstep_redis.rq.functions import with_defaults
from squidstep_redis.rq.installed import Job

_MISTAKE = (
    "This job has already called the step with the other input, whose result it would get again. In a loop, give each "
    "call a step name of its own, such as f'reserve-{n}'."
)


class Inputs:
    """The inputs of the steps that were called in one execution of a job, or with one run outside of a job.

    They are kept with the job, because each `current_run()` of a function without a decorator makes a run. The time of
    its start distinguishes the executions of a job that RQ runs again in the same process.
    """

    def __init__(self, job: Job | None) -> None:
        self._started_at = None if job is None else job.started_at
        # Threads of a job may call their first steps at the same time: `setdefault` is atomic.
        self._seen: dict[object, bytes] = (
            {} if self._started_at is None else vars(job).setdefault("_squidstep_inputs", {})
        )

    @contextmanager
    def one_of(self, run_id: str, step: Step, bound: BoundArguments) -> Generator[None, None, None]:
        """Keeps the input of a call during the block, and if the block raises nothing, for the rest of the execution.

        Raises:
            InputMismatchError: the step has been called with another input.
        """
        name = checked(step).text
        given = _digest(bound)
        key = (self._started_at, run_id, name)
        is_first = key not in self._seen
        kept = given
        try:
            # An exception from outside may arrive at any instruction, so nothing is kept before the `try`.
            if given:
                kept = self._seen.setdefault(key, given)
            if kept == given:
                yield
                return
        except BaseException:
            if is_first:  # the step has no result that another call could get
                self._seen.pop(key, None)
            raise
        error = InputMismatchError(run_id, name, kept.decode(), given.decode())
        error.add_note(_MISTAKE)
        raise error


def _digest(bound: BoundArguments) -> bytes:
    """Returns the fingerprint of a call's arguments; empty if the user's codec accepts what has none."""
    for each in (with_defaults(bound), bound):  # a default need not be storable
        try:
            return digest("input", dict(each.arguments))
        except PayloadError:
            continue
    return b""
