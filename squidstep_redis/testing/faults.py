"""Faults between a store and its server, at a moment chosen by the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from redis.exceptions import ConnectionError

from squidstep_redis import StepRun, StepRunStore, StepStatus
from squidstep_redis.protocol.arguments import RunId, Seconds, Step, run_id, step
from squidstep_redis.protocol.scripts import names
from squidstep_redis.testing.clock import StepClock, script_of
from squidstep_redis.testing.interception import Command

_Kind = Literal["lose_reply", "lose_request", "refuse", "before", "killed_at"]

_ERROR: Final = b"return redis.error_reply(ARGV[1])"
OUT_OF_MEMORY: Final = "OOM command not allowed when used memory > 'maxmemory'"


class WorkerKilled(BaseException):
    """Ends the code in a block of `killed_at`. A BaseException, because no code can catch a SIGKILL either."""

    ends_process = True  # so the claims of the code are neither given back nor recorded as failed


@dataclass
class _Fault:
    """A fault that a test has requested."""

    kind: _Kind
    operation: str
    times: int
    key_end: bytes  # the end of the run's first key; empty: any run
    step: bytes  # empty: any step
    detail: Any = None

    def applies_to(self, command: Command, operation: str | None) -> bool:
        """Returns whether the fault applies to a command.

        Args:
            command: the words of the command.
            operation: the operation it runs.
        """
        if operation != self.operation or not self.times:
            return False
        return command[3].endswith(self.key_end) and (not self.step or self.step in command[3:])

    def __str__(self) -> str:
        of = "".join((f" of step {self.step.decode()!r}" if self.step else "", " of that run" if self.key_end else ""))
        return f"{self.kind}({self.operation!r}){of}: {self.times} left"


class StepFaults:
    """Faults for the stores of a kit, and for all other commands sent through their clients.

    Each fault names an operation, such as `"complete_step"`. It occurs when the operation is next sent: alone, in a
    batch, on a pipeline, or by a heartbeat. A fault that has not occurred by the end of the test is an error, because
    the test has not tested what it claims. `heal` cancels all faults.
    """

    def __init__(self, clock: StepClock, observer: Callable[[], StepRunStore]) -> None:
        """Makes the faults of a kit; only the kit does.

        Args:
            clock: shifts the time of each command.
            observer: returns the kit's observing store, which no fault affects.
        """
        self._clock = clock
        self._observer = observer
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._is_away = False
        self._killed: object = None  # the task or thread that `killed_at` killed

    def __repr__(self) -> str:
        return f"<StepFaults {self.pending()}>"

    # For tests

    def lose_reply(self, operation: str, *, times: int = 1, run: RunId | None = None, step: Step | None = None) -> None:
        """Loses the reply to an operation: the server executes it, then the connection breaks.

        The store re-sends the same call until its `timeout`, and gets the same result. If every reply until then is
        lost, it raises OutcomeUnknownError.

        Args:
            operation: the name of the store's method, such as `"begin_step"`.
            times: the number of consecutive calls that the fault applies to; 1 or more.
            run: the id of the run; None: any run.
            step: the name of the step; None: any step.

        Raises:
            ValueError: there is no such operation, or `times` is less than 1.
        """
        self._add("lose_reply", operation, times, run, step)

    def lose_request(
        self, operation: str, *, times: int = 1, run: RunId | None = None, step: Step | None = None
    ) -> None:
        """Breaks the connection before an operation reaches the server.

        The store cannot distinguish this from a lost reply. Commands that are sent in one go, such as a batch, are lost
        together.

        Args:
            operation: the name of the store's method, such as `"begin_step"`.
            times: the number of consecutive calls that the fault applies to; 1 or more.
            run: the id of the run; None: any run.
            step: the name of the step; None: any step.

        Raises:
            ValueError: there is no such operation, or `times` is less than 1.
        """
        self._add("lose_request", operation, times, run, step)

    def refuse(
        self,
        operation: str,
        error: str = OUT_OF_MEMORY,
        *,
        times: int = 1,
        run: RunId | None = None,
        step: Step | None = None,
    ) -> None:
        """Rejects an operation with a server error. The operation does not reach the server.

        Args:
            operation: the name of the store's method, such as `"begin_step"`.
            error: the server's error message. OOM raises RefusedError at once. Transient errors (READONLY, LOADING, …)
                are retried until the store's `timeout`.
            times: the number of consecutive calls that the fault applies to; 1 or more.
            run: the id of the run; None: any run.
            step: the name of the step; None: any step.

        Raises:
            ValueError: there is no such operation, or `times` is less than 1.
        """
        self._add("refuse", operation, times, run, step, error)

    def before(
        self,
        operation: str,
        hook: Callable[[], object],
        *,
        times: int = 1,
        run: RunId | None = None,
        step: Step | None = None,
    ) -> None:
        """Calls a function immediately before an operation is sent.

        Args:
            operation: the name of the store's method, such as `"begin_step"`.
            hook: the function, without parameters. It may use the store, deliver the step a second time, or advance the
                clock. With `async_step_store` it may be a coroutine function. The operation raises what the hook
                raises.
            times: the number of consecutive calls that the fault applies to; 1 or more.
            run: the id of the run; None: any run.
            step: the name of the step; None: any step.

        Raises:
            ValueError: there is no such operation, or `times` is less than 1.
        """
        self._add("before", operation, times, run, step, hook)

    def take_over(
        self,
        run: RunId,
        step: Step,
        *,
        output: Mapping[str, Any] | None = None,
        before: str | None = None,
        lease: Seconds | None = 30,
        owner: str = "another worker",
    ) -> StepRun | None:
        """Simulates a takeover by another worker: expires the lease and claims the step.

        Args:
            run: the id of the run.
            step: the name of the step, which must be running.
            output: the output with which the other worker completes the step; None: it is still working.
            before: take over immediately before this operation is sent, such as `"complete_step"`; None: now.
            lease: the other worker's lease, in seconds; None: its claim never expires.
            owner: the other worker's name.

        Returns:
            The other worker's step run, which carries its claim; None if `before` is given.

        Raises:
            AssertionError: the step is not running.
        """
        if before is not None:
            self.before(
                before, lambda: self.take_over(run, step, output=output, lease=lease, owner=owner), run=run, step=step
            )
            return None
        store = self._observer()
        current = store.get_step_run(run, step)
        if current is None or current.status is not StepStatus.RUNNING:
            raise AssertionError(f"take_over: step {step!r} of run {run!r} is not running: {current}")
        store.expire_claim(current)
        winner = store.begin_step(run, step, current.input, lease=lease, owner=owner).step_run
        return winner if output is None else store.complete_step(winner, output)

    @contextmanager
    def server_away(self) -> Generator[None, None, None]:
        """Makes the server unreachable within the block. Calls raise NotSentError after the store's `timeout`."""
        self._is_away = True
        try:
            yield
        finally:
            self._is_away = False

    @contextmanager
    def killed_at(
        self, operation: str, *, run: RunId | None = None, step: Step | None = None
    ) -> Generator[None, None, None]:
        """Kills the code in the block when it is about to send an operation. The test continues after the block.

        As with a killed process, no failure is recorded and no claim released, but effects outside the store remain.
        Unlike in a killed process, `finally` clauses run.

        Args:
            operation: the name of the store's method, such as `"begin_step"`.
            run: the id of the run; None: any run.
            step: the name of the step; None: any step.

        Raises:
            AssertionError: the block ended without sending the operation.
            ValueError: there is no such operation.
        """
        fault = self._add("killed_at", operation, 1, run, step)
        try:
            yield
        except* WorkerKilled:  # a group of tasks raises it in a group
            pass
        finally:
            self._killed = None
            with self._lock:
                self._faults.remove(fault)
        if fault.times:
            raise AssertionError(f"killed_at: the block never sent {operation}")

    def pending(self) -> list[str]:
        """Returns a description of each fault that has not occurred yet."""
        with self._lock:
            return [str(fault) for fault in self._faults if fault.times]

    def heal(self) -> None:
        """Cancels all faults that have not occurred yet."""
        with self._lock:
            self._faults.clear()

    def _add(
        self, kind: _Kind, operation: str, times: int, run: RunId | None, of: Step | None, detail: Any = None
    ) -> _Fault:
        known = names()
        if operation not in known:
            hint = " (expire_claim is sent as extend_claim)" if operation == "expire_claim" else ""
            raise ValueError(f"operation: {operation!r} does not exist{hint}; use one of {', '.join(known)}")
        if times < 1:
            raise ValueError(f"times: must be 1 or more, not {times!r}")
        key_end = b"" if run is None else b"}:%b:steps" % run_id(run).data
        fault = _Fault(kind, operation, times, key_end, b"" if of is None else step(of).data, detail)
        with self._lock:
            self._faults.append(fault)
        return fault

    # As an Interceptor

    def check(self) -> None:
        """Raises ConnectionError if the server is away, and WorkerKilled in the code that was killed."""
        if self._is_away or self._killed is not None:
            if self._killed == _current_worker():
                raise WorkerKilled
            raise ConnectionError("Connection refused (by step_faults)")

    def hooks(self, commands: list[Command]) -> Iterable[Callable[[], object]]:
        """Returns the functions to call before the commands are sent, and uses up their faults."""
        faults = [self._use_fault(command, "before") for command in commands]
        return [fault.detail for fault in faults if fault is not None]

    def intercept(self, commands: list[Command]) -> tuple[list[Command], list[bool]]:
        """Applies the faults to the commands: returns the commands to send, and for each whether its reply is lost."""
        self.check()
        sent: list[Command] = []
        losses: list[bool] = []
        for command in commands:
            fault = self._use_fault(command, "lose_reply", "lose_request", "refuse", "killed_at")
            kind, detail = (fault.kind, fault.detail) if fault else (None, None)
            if kind == "killed_at":
                self._killed = _current_worker()
                self.check()
            if kind == "lose_request":
                raise ConnectionError("the request was lost (by step_faults)")
            refusal = [b"EVAL", _ERROR, b"0", str(detail).encode()]
            sent.append(refusal if kind == "refuse" else self._clock.shift(command))
            losses.append(kind == "lose_reply")
        return sent, losses

    def _use_fault(self, command: Command, *kinds: _Kind) -> _Fault | None:
        """Uses up and returns the first fault that applies to a command; None if none does."""
        operation = script_of(command) if len(command) > 3 else None  # SCRIPT LOAD executes nothing
        if operation is None:
            return None
        with self._lock:
            for fault in self._faults:
                if fault.kind in kinds and fault.applies_to(command, operation):
                    fault.times -= 1
                    return fault
        return None


def _current_worker() -> object:
    """Returns the current task, or the current thread's id outside of one."""
    with suppress(RuntimeError):
        if (task := asyncio.current_task()) is not None:
            return task
    return threading.get_ident()
