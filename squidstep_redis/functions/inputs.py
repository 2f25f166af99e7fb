"""The inputs of the steps of one execution: one step that is called with several inputs is a mistake in the code."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from inspect import BoundArguments
from weakref import ref

from squidstep_redis.errors import InputMismatchError
from squidstep_redis.functions.arguments import digest_of
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Step

_MISTAKE = (
    "This execution has already called the step with the other input, and would get that result again. In a loop, give "
    "each call its own step name, such as f'reserve-{n}'."
)

Kept = tuple[bytes, "ref[OneInput] | None"]
"""The fingerprint of an input, and the block of the call while it has no result."""


class Inputs:
    """The inputs of the steps that were called in one execution, for example of a job, or with one run object."""

    def __init__(self, seen: dict[object, Kept] | None = None, execution: object = None) -> None:
        """Makes the inputs.

        Args:
            seen: stores them, if several objects share them; None: this object does. Threads may use it at the same
                time.
            execution: distinguishes the executions that share `seen`.
        """
        self._seen: dict[object, Kept] = {} if seen is None else seen
        self._execution = execution

    def one_of(self, run_id: RunId, step: Step, bound: BoundArguments, excluded: AbstractSet[str]) -> OneInput:
        """Keeps the input of a call during the block; if the block raises nothing, for the rest of the execution.

        Args:
            run_id: the run of the step.
            step: the name of the step.
            bound: the arguments of the call.
            excluded: names of arguments that are not part of the input.

        Raises:
            InputMismatchError: when the block is entered: the step has been called with a different input.
        """
        run, name = arguments.run_id(run_id).text, arguments.step(step).text
        return OneInput(self._seen, (self._execution, run, name), digest_of(bound, excluded))


class OneInput:
    """A `with` block that keeps the input of a step. A `contextmanager` would assign to exceptions: some are frozen.

    An exception from outside may arrive at any instruction, even while the block is being left, so that it never is
    left. The input of such a block no longer counts once the block object is freed.
    """

    def __init__(self, seen: dict[object, Kept], key: tuple[object, str, str], given: bytes) -> None:
        self._seen = seen
        self._key = key
        self._given = given
        self._is_first = False

    def __enter__(self) -> None:
        if not self._given:
            return
        own: Kept = self._given, ref(self)
        kept = self._seen.setdefault(self._key, own)  # atomic: threads may call their first steps at the same time
        if kept[1] is not None and kept[1]() is None:
            kept = self._seen[self._key] = own
        self._is_first = kept is own
        if kept[0] == self._given:
            return
        _, run, name = self._key
        mismatch = InputMismatchError(run, name, kept[0].decode(), self._given.decode())
        mismatch.add_note(_MISTAKE)
        raise mismatch

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._given:
            self._seen[self._key] = self._given, None
        elif self._is_first:  # the step has no result that another call could get
            self._seen.pop(self._key, None)
