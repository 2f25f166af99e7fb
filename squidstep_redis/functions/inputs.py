"""The inputs of the steps of one execution: one step that is called with several inputs is a mistake in the code."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from inspect import BoundArguments

from squidstep_redis.errors import InputMismatchError
from squidstep_redis.functions.arguments import digest_of
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Step

_MISTAKE = (
    "This execution has already called the step with the other input, whose result it would get again. In a loop, give "
    "each call a step name of its own, such as f'reserve-{n}'."
)


class Inputs:
    """The inputs of the steps that were called in one execution, for example of a job, or with one run object."""

    def __init__(self, seen: dict[object, bytes] | None = None, execution: object = None) -> None:
        """Makes the inputs.

        Args:
            seen: where they are kept, if several objects share them; None: in this object. Threads may use it at the
                same time.
            execution: what distinguishes the executions that share `seen`.
        """
        self._seen: dict[object, bytes] = {} if seen is None else seen
        self._execution = execution

    @contextmanager
    def one_of(
        self, run_id: RunId, step: Step, bound: BoundArguments, excluded: AbstractSet[str]
    ) -> Generator[None, None, None]:
        """Keeps the input of a call during the block, and if the block raises nothing, for the rest of the execution.

        Args:
            run_id: the run of the step.
            step: the name of the step.
            bound: the arguments of the call.
            excluded: names of arguments that are not part of the input.

        Raises:
            InputMismatchError: the step has been called with another input.
        """
        run, name = arguments.run_id(run_id).text, arguments.step(step).text
        given = digest_of(bound, excluded)
        key = (self._execution, run, name)
        is_first = key not in self._seen
        kept = given
        try:
            # An exception from outside may arrive at any instruction, so nothing is kept before the `try`.
            if given:
                kept = self._seen.setdefault(key, given)  # atomic: threads may call their first steps at the same time
            if kept == given:
                yield
                return
        except BaseException:
            if is_first:  # the step has no result that another call could get
                self._seen.pop(key, None)
            raise
        error = InputMismatchError(run, name, kept.decode(), given.decode())
        error.add_note(_MISTAKE)
        raise error
