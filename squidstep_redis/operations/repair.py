"""Trying again what failed: the operations that give a step new attempts."""

from __future__ import annotations

from squidstep_redis.errors import CorruptRunError, StaleStepRunError, StepRunNotFoundError
from squidstep_redis.model import StepRun, StepStatus
from squidstep_redis.operations.context import token
from squidstep_redis.operations.runs import Batches, Listing, raise_unless_corrupt
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Step
from squidstep_redis.protocol.call import Call, Exchange, Reply
from squidstep_redis.protocol.scripts import script

_STEPS_AT_ONCE = 1_000


class Repairs(Listing):
    """Makes the call for each operation that repairs."""

    def retry_step(self, run_id: RunId, step: Step, *, owner: str | None = None) -> Call[StepRun]:
        """Makes a failed step pending again, with the input it had and with attempts that count anew.

        One round trip. The next `begin_step` executes it, whatever its `max_attempts`; this one does not execute
        anything, so have the step delivered again. It is as if you had claimed the step and given it back: the
        history keeps the attempt that failed, and shows one more, `released`, by `owner`. A step whose lease is over
        is taken to have failed. One that is pending already stays as it is. Sent again, it answers the same.

        Args:
            run_id: as for `schedule_step`.
            step: likewise.
            owner: who retries, for the history: as for `begin_step`.

        Returns:
            The pending step run.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            StaleStepRunError: the step is completed, or a claim on it is live; nothing was written.
            StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
            CorruptRunError: what is stored cannot be trusted.
        """
        run = self._run(run_id)
        name = arguments.step(step)

        def parse(reply: Reply) -> StepRun:
            if reply[0] == b"missing":
                raise StepRunNotFoundError(run.text, name.text, "there is no such step run; nothing was written")
            values = reply[2:] if len(reply) > 4 else [*reply[2:], None, None]
            step_run = self._records.record(run.text, name.text, values, run.keys.steps)
            if reply[0] == b"stale":
                why = "is completed" if step_run.status is StepStatus.COMPLETED else "is being executed"
                raise StaleStepRunError(step_run, f"retry_step was refused, the step {why}. Nothing was written")
            return step_run

        args = (token(), name.data, run.member, arguments.owner(owner))
        return Call(run.text, script("retry_step"), run.keys, args, parse, step=name.text)

    def retry_run(self, run_id: RunId, *, owner: str | None = None) -> Exchange[list[StepRun]]:
        """Makes all failed steps of a run pending again, each as `retry_step` does.

        Two round trips for a run of ordinary size, one more for each 500 fields and each thousand failed steps.
        Each step by itself is atomic; one that is begun by somebody else meanwhile is left out.

        Args:
            run_id: as for `schedule_step`.
            owner: who retries, for the history: as for `begin_step`.

        Returns:
            The step runs that are pending now and had failed, in the order they came to be.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            CorruptRunError: what is stored cannot be trusted.
            StepRunNotFoundError: there is no such run.
        """
        return self._retry_run(run_id, owner)

    def _retry_run(self, run_id: RunId, owner: str | None) -> Batches[list[StepRun]]:
        run = self._run(run_id)
        arguments.owner(owner)
        walks = yield from self._walk([run.text.encode()])
        if not walks:
            raise StepRunNotFoundError(run.text, None, "there is no such run; nothing was written")
        if walks[0].problem is not None:
            raise CorruptRunError(run.text, run.keys.steps.decode(), walks[0].problem)
        failed = [each for each in walks[0].unfinished.values() if each.status is StepStatus.FAILED]
        failed.sort(key=lambda step_run: step_run.position)
        retried: list[StepRun] = []
        for first in range(0, len(failed), _STEPS_AT_ONCE):
            steps = failed[first : first + _STEPS_AT_ONCE]
            answers = yield tuple(self.retry_step(run_id, step_run.step, owner=owner) for step_run in steps)
            gone = (StaleStepRunError, StepRunNotFoundError)
            for answer in raise_unless_corrupt([answer for answer in answers if not isinstance(answer, gone)]):
                if isinstance(answer, CorruptRunError):
                    raise answer
                retried.append(answer)
        return retried
