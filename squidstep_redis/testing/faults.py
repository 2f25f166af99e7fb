"""What goes wrong between a store and its server, or beside it, at the moment that a test chooses."""

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
from squidstep_redis.protocol.scripts import directory
from squidstep_redis.testing.clock import StepClock, script_of
from squidstep_redis.testing.tap import Command

_Kind = Literal["lose_reply", "lose_request", "refuse", "before", "killed_at"]

_ERROR: Final = b"return redis.error_reply(ARGV[1])"
OUT_OF_MEMORY: Final = "OOM command not allowed when used memory > 'maxmemory'"


class WorkerKilled(BaseException):
    """Ends the code that `killed_at` kills: no `except Exception` is to catch it, as none catches a SIGKILL."""


@dataclass
class _Fault:
    """One fault that is still to strike."""

    kind: _Kind
    operation: str
    times: int
    key_end: bytes  # of the run's first key; empty for any run
    step: bytes  # empty for any step
    detail: Any = None

    def fits(self, command: Command, operation: str | None) -> bool:
        """Whether it strikes this command."""
        if operation != self.operation or not self.times:
            return False
        return command[3].endswith(self.key_end) and (not self.step or self.step in command[3:])

    def __str__(self) -> str:
        of = "".join((f" of step {self.step.decode()!r}" if self.step else "", " of that run" if self.key_end else ""))
        return f"{self.kind}({self.operation!r}){of}: {self.times} to go"


class StepFaults:
    """Faults for the stores of a kit, and for whatever else is sent through their clients.

    Each names an operation (`"complete_step"`), and strikes when it is sent next, be it by itself, in a batch, by a
    heartbeat or on a pipeline: `times` times, for any run and step unless you name them. A fault that has not struck by
    the end of the test is an error: the test has not tested what it says. `heal` calls them off.
    """

    def __init__(self, clock: StepClock, observer: Callable[[], StepRunStore]) -> None:
        """Made by the kit alone; the observer's own calls are spared."""
        self._clock = clock
        self._observer = observer
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._is_away = False
        self._killed: object = None  # the task or thread that was

    def __repr__(self) -> str:
        return f"<StepFaults {self.pending()}>"

    # What a test asks for

    def lose_reply(self, operation: str, *, times: int = 1, run: RunId | None = None, step: Step | None = None) -> None:
        """Lets the server carry out an operation, and loses its reply: the connection breaks.

        The store sends the very same call again, and is answered the same, until its `timeout`. With more `times` than
        that it raises OutcomeUnknownError.

        Args:
            operation: the name of the method, such as `"begin_step"`.
            times: how often, in a row.
            run: of this run alone.
            step: of this step alone.

        Raises:
            ValueError: there is no such operation.
        """
        self._add("lose_reply", operation, times, run, step)

    def lose_request(
        self, operation: str, *, times: int = 1, run: RunId | None = None, step: Step | None = None
    ) -> None:
        """Breaks the connection before the server has heard of an operation; the store cannot tell that from the above.

        What was to be sent in one go, such as a batch, is lost as a whole.

        Args:
            operation: as for `lose_reply`, like the rest.
            times: see there.
            run: see there.
            step: see there.
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
        """Answers an operation with an error in place of the server, which never hears of it.

        Args:
            operation: as for `lose_reply`, like all but `error`.
            error: as a server words it. OOM becomes RefusedError at once; what may pass within seconds (READONLY,
                LOADING, …) is sent again first, until the store's `timeout`.
            times: see there.
            run: see there.
            step: see there.
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
        """Calls a function at the moment at which an operation is about to be sent: what happens meanwhile.

        It may use the store, deliver the step a second time, or move the clock. For `async_step_store` it may be a
        coroutine function.

        Args:
            operation: as for `lose_reply`, like all but `hook`.
            hook: what to call; what it raises, the operation raises.
            times: see there.
            run: see there.
            step: see there.
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
        """Lets another worker take the step over: its lease ends now, and is followed by another's claim.

        Args:
            run: the run.
            step: the step, which somebody holds.
            output: what the other worker completes it with; None: it is still at it.
            before: the operation before which it happens, such as `"complete_step"`; None: now.
            lease: of the other worker's claim.
            owner: who the other worker is.

        Returns:
            The other worker's step run, which carries its claim; None if it is still to happen.

        Raises:
            AssertionError: nobody holds the step.
        """
        if before is not None:
            self.before(
                before, lambda: self.take_over(run, step, output=output, lease=lease, owner=owner), run=run, step=step
            )
            return None
        store = self._observer()
        held = store.get_step_run(run, step)
        if held is None or held.status is not StepStatus.RUNNING:
            raise AssertionError(f"take_over: nobody holds step {step!r} of run {run!r}: {held}")
        store.expire_claim(held)
        taken = store.begin_step(run, step, held.input, lease=lease, owner=owner).step_run
        return taken if output is None else store.complete_step(taken, output)

    @contextmanager
    def server_away(self) -> Generator[None, None, None]:
        """Inside the block, nobody answers and nobody can connect: NotSentError after the store's `timeout`."""
        self._is_away = True
        try:
            yield
        finally:
            self._is_away = False

    @contextmanager
    def killed_at(
        self, operation: str, *, run: RunId | None = None, step: Step | None = None
    ) -> Generator[None, None, None]:
        """Kills the code in the block at the moment at which it is about to send an operation.

        As of a process that is killed, nothing is heard of it any more: no failure is recorded, no claim given back.
        What it did outside of the store is done. `finally` clauses do run; the test goes on behind the block.

        Args:
            operation: as for `lose_reply`, like the rest.
            run: see there.
            step: see there.

        Raises:
            AssertionError: the block ended by itself.
        """
        fault = self._add("killed_at", operation, 1, run, step)
        try:
            yield
        except WorkerKilled:
            pass
        finally:
            self._killed = None
            with self._lock:
                self._faults.remove(fault)
        if fault.times:
            raise AssertionError(f"killed_at: the block never sent {operation}")

    def pending(self) -> list[str]:
        """The faults that have not struck yet."""
        with self._lock:
            return [str(fault) for fault in self._faults if fault.times]

    def heal(self) -> None:
        """Calls off what has not struck yet."""
        with self._lock:
            self._faults.clear()

    def _add(
        self, kind: _Kind, operation: str, times: int, run: RunId | None, of: Step | None, detail: Any = None
    ) -> _Fault:
        known = {path.stem for path in directory().glob("*.lua")}
        if operation not in known:
            hint = ", which is sent as an extend_claim" if operation == "expire_claim" else ""
            raise ValueError(f"operation: {operation!r} is none{hint}; there are {', '.join(sorted(known))}")
        if times < 1:
            raise ValueError(f"times: must be 1 or more, not {times!r}")
        key_end = b"" if run is None else b"}:%b:steps" % run_id(run).data
        fault = _Fault(kind, operation, times, key_end, b"" if of is None else step(of).data, detail)
        with self._lock:
            self._faults.append(fault)
        return fault

    # The line's side: see tap.Line

    def check(self) -> None:
        """Raises ConnectionError if the server is away."""
        if self._is_away or self._killed is not None:
            if self._killed == _who():
                raise WorkerKilled
            raise ConnectionError("Connection refused (by step_faults)")

    def hooks(self, commands: list[Command]) -> Iterable[Callable[[], object]]:
        """What is to be called before these commands are sent; each is handed out once."""
        return [fault.detail for command in commands for fault in self._struck(command, "before")]

    def strike(self, commands: list[Command]) -> tuple[list[Command], list[bool]]:
        """What to send in place of these commands, and of which the reply is to be lost."""
        self.check()
        sent: list[Command] = []
        losses: list[bool] = []
        for command in commands:
            kinds = {
                fault.kind: fault
                for fault in self._struck(command, "lose_reply", "lose_request", "refuse", "killed_at")
            }
            if "killed_at" in kinds:
                self._killed = _who()
                self.check()
            if "lose_request" in kinds:
                raise ConnectionError("the request was lost (by step_faults)")
            refusal = kinds.get("refuse")
            sent.append([b"EVAL", _ERROR, b"0", refusal.detail.encode()] if refusal else self._clock.moved(command))
            losses.append("lose_reply" in kinds)
        return sent, losses

    def _struck(self, command: Command, *kinds: _Kind) -> list[_Fault]:
        """The fault that strikes a command now, if there is one: of several the first that was asked for."""
        operation = script_of(command) if len(command) > 3 else None  # SCRIPT LOAD runs nothing
        if operation is None:
            return []
        with self._lock:
            for fault in self._faults:
                if fault.kind in kinds and fault.fits(command, operation):
                    fault.times -= 1
                    return [fault]
        return []


def _who() -> object:
    """The task that now runs, or else the thread."""
    with suppress(RuntimeError):
        if (task := asyncio.current_task()) is not None:
            return task
    return threading.get_ident()


class Undisturbed:
    """The line of a kit's own connections: they go by the clock, and nothing happens to them."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def check(self) -> None:
        """The server is there."""

    def hooks(self, commands: list[Command]) -> Iterable[Callable[[], object]]:  # noqa: ARG002 -- of every line
        """None."""
        return ()

    def strike(self, commands: list[Command]) -> tuple[list[Command], list[bool]]:
        """The commands, as they go by the clock."""
        return [self._clock.moved(command) for command in commands], [False] * len(commands)
