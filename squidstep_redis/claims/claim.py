"""The claim of a blocking store: a `with` block."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from squidstep_redis.claims.heartbeat import heartbeat_of
from squidstep_redis.claims.request import ClaimRequest
from squidstep_redis.claims.rules import BaseClaim
from squidstep_redis.claims.threads import LockFreeEvent
from squidstep_redis.claims.unfinished import INTERRUPTED_SECONDS, UnfinishedClaim
from squidstep_redis.errors import SquidstepError, add_note
from squidstep_redis.model import StepRun
from squidstep_redis.protocol.arguments import Seconds, StepInputs
from squidstep_redis.protocol.workflow import Workflow
from squidstep_redis.server_errors import OutcomeUnknownError
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.blocking import BlockingTransport, run_workflow


class Claim(BaseClaim[threading.Event]):
    """A step to be executed or skipped by this delivery: the `with` block that `claim_step` returns."""

    def __init__(
        self,
        store: Any,  # of a higher layer
        transport: BlockingTransport,
        request: ClaimRequest,
    ) -> None:
        super().__init__(store.calls, request, LockFreeEvent(), LockFreeEvent())
        self.store = store
        self._transport = transport

    # An exception from outside may arrive at any instruction, and a second one soon after it. So the necessary work is
    # handed over to a background thread in one operation: nothing can come between catching the exception and that
    # operation. It starts a thread, which starts the next one: see `BackgroundThread.start`.

    def __enter__(self) -> Self:
        self._raise_if_entered()
        self._sent = None
        heartbeat = self._heartbeat = heartbeat_of(self.store)
        unfinished = self._unfinished = UnfinishedClaim()
        recover, start_thread = heartbeat.recovery.recover, _thread.start_new_thread
        deferred = defer_sigalrm()
        try:
            with deferred:
                run_workflow(self._transport, self._acquire(), deferred.sleep)
                self._enter()
                if self._state == "held" and self._lease is not None:
                    heartbeat.add(self)
            return self
        except BaseException as error:
            begin = unfinished.begin = self._sent
            if begin is not None:  # it may have acquired the claim
                unfinished.error = error
                try:
                    start_thread(start_thread, (recover, (unfinished,)))
                except RuntimeError:
                    heartbeat.recovery.queue.append(unfinished)
            self._stop()
            if begin is not None:
                heartbeat.recovery.wait_for(unfinished, _seconds_to_wait(error))
            deferred.__exit__()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unfinished = self._unfinished
        recovery, start_thread = self._heartbeat.recovery, _thread.start_new_thread
        recover, deferred = recovery.recover, defer_sigalrm()
        is_own = self._entered_by == os.getpid()  # in a forked child, the claim belongs to the parent
        if error is None or not self._is_interruption(error):
            try:
                with deferred:
                    missing = run_workflow(self._transport, self._on_exit(error), deferred.sleep)
                if is_own and self._state != "ended" and self._lease is None:  # nothing else would ever end the claim
                    unfinished.step_run, unfinished.error = self._claim, missing if error is None else error
                    unfinished.verdict_of, unfinished.checkpoint = self._verdict, self._lazy.pending
                    recovery.queue.append(unfinished)
                    recovery.wait_for(unfinished, 0)
                self._stop()
            except BaseException as interruption:
                if is_own and self._state != "ended":
                    unfinished.step_run, unfinished.error = self._claim, interruption if error is None else error
                    unfinished.verdict_of, unfinished.checkpoint = self._verdict, self._lazy.pending
                    try:
                        start_thread(start_thread, (recover, (unfinished,)))
                    except RuntimeError:
                        recovery.queue.append(unfinished)
                self._leave_soon()
                deferred.__exit__()
                raise
            if missing is not None:
                raise missing
        else:
            if is_own and self._state != "ended":
                unfinished.step_run, unfinished.error = self._claim, error
                unfinished.verdict_of, unfinished.checkpoint = self._verdict, self._lazy.pending
                try:
                    start_thread(start_thread, (recover, (unfinished,)))
                except RuntimeError:
                    recovery.queue.append(unfinished)
            self._leave_soon()

    def exit_again(self, interruption: BaseException) -> None:
        """Exits the block if an exception from outside kept `__exit__` from doing it. For `run_step`."""
        if self._entered_by is not None:
            self._interruption = interruption
            self.__exit__(type(interruption), interruption, interruption.__traceback__)

    def _leave_soon(self) -> None:
        """Leaves an interrupted block, whose claim may have been handed over."""
        unfinished = self._unfinished
        self._stop()
        if unfinished.step_run is not None:
            if self._lease is not None:
                unfinished.deadline = time.monotonic() + self._longest_retry
            self._heartbeat.recovery.wait_for(unfinished, INTERRUPTED_SECONDS)
            if not unfinished.is_recovered and unfinished.error is not None:
                add_note(unfinished.error, "squidstep_redis is still trying to record this failure")

    def checkpoint(self, progress: Mapping[str, Any], *, lazy: bool = False) -> None:
        """Stores how far the work has come. The next attempt finds it in `claim.progress`, unless this one completes.

        One round trip, or none. Make a checkpoint after each part of the work that must not be repeated; it replaces
        the one before it.

        Args:
            progress: a dict, stored under the same rules and the same limit as an input.
            lazy: whether to let the heartbeat carry it: the next extension stores the latest one, at most a third of
                the lease later. It is also stored before the claim is failed or released. If the process dies before
                that, it is lost. A claim without a lease has no heartbeat, and stores it at once.

        Raises:
            StaleStepRunError: the claim was lost; nothing was written.
            StepRunNotFoundError: the run was deleted.
            PayloadError: the progress cannot be stored; the claim is still held, and so is the earlier checkpoint.
            ServerError: it could not be stored within the store's timeout; the claim is still held.
        """
        run_workflow(self._transport, self._checkpoint(progress, lazy))

    def complete(self, output: Mapping[str, Any], *, schedule: StepInputs | None = None) -> StepRun:
        """Ends the claim with an output. One round trip, retried as long as in `run_step`.

        Args:
            output: the step's output, a dict.
            schedule: a dict of input by step: the steps in it that have no record become pending; None: none.

        Returns:
            The completed step run: the winner's, if the claim was lost to it.

        Raises:
            StaleStepRunError: the claim was lost, and the step is not completed.
            StepRunNotFoundError: the run was deleted.
            PayloadError: the output cannot be stored; the claim is still held. If it leaves the block, the step has
                failed permanently: the work may have taken effect.
            ServerError: the result could not be sent in time; the claim expires with its lease.
        """
        return self._run_ending(self._complete(output, schedule))

    def fail(
        self, error: Mapping[str, Any] | BaseException, *, final: bool = False, retry_after: Seconds | None = None
    ) -> StepRun:
        """Ends the claim with an error. One round trip, retried as long as in `run_step`.

        Args:
            error: a dict; or an exception, which is stored as a dict of `type`, `message` and `traceback`.
            final: whether the step has failed permanently, until `retry_step`.
            retry_after: seconds, or a timedelta, from 0.001, until the step can be claimed again; None: at once.

        Returns:
            The failed step run: the winner's completed one, if the claim was lost to it.

        Raises:
            StaleStepRunError: the claim was lost, and the step is not completed.
            StepRunNotFoundError: the run was deleted.
            InvalidArgumentError: an argument was rejected; the claim is still held. PayloadError for the error.
            ServerError: the error could not be sent in time; the claim expires with its lease.
        """
        return self._run_ending(self._fail(error, final, retry_after))

    def release(self) -> StepRun:
        """Releases the claim before the work took effect, for example on SIGTERM. One round trip, retried.

        The attempt does not count against `max_attempts`, and the step can be claimed immediately.

        Returns:
            The pending step run: the winner's completed one, if the claim was lost to it.

        Raises:
            StaleStepRunError: the claim was lost, and the step is not completed.
            StepRunNotFoundError: the run was deleted.
            ServerError: the release could not be sent in time; the claim expires with its lease.
        """
        return self._run_ending(self._release())

    def _run_ending(self, ending: Workflow[StepRun]) -> StepRun:
        deferred = defer_sigalrm()
        try:
            with deferred:
                return run_workflow(self._transport, ending, deferred.sleep)
        except SquidstepError:
            raise
        except BaseException as interruption:
            self._interruption = interruption
            deferred.__exit__()
            raise
        finally:
            ending.close()  # it restores the state, although the traceback may keep it alive

    def _stop(self) -> None:
        self._exit()
        if self._lease is not None:
            self._heartbeat.discard(self)


def _seconds_to_wait(error: BaseException) -> float:
    """How long an interrupted entry waits until the claim is given back; it does not wait if the server is silent."""
    return 0 if isinstance(error, OutcomeUnknownError) else INTERRUPTED_SECONDS
