"""The operations as data: for each, what is sent and how its reply is read. Pure: no I/O, no rule in a second place.

`StepRunStore` and `AsyncStepRunStore` have a method of the same name for each, which sends the call and answers what
it answers here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

from squidstep_redis.errors import InvalidArgumentError
from squidstep_redis.operations.context import nonce, token
from squidstep_redis.operations.export import Transfers
from squidstep_redis.operations.reads import Reads
from squidstep_redis.operations.repair import Repairs
from squidstep_redis.operations.transitions import Transitions
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Seconds
from squidstep_redis.protocol.call import Call, Exchange, Reply, check_calls
from squidstep_redis.protocol.scripts import script

T = TypeVar("T")


class Calls(Transitions, Reads, Repairs, Transfers):
    """Makes the call for each operation of one store; here those on whole runs, and the batch."""

    def expire_run(self, run_id: RunId, ttl: Seconds | None) -> Call[bool]:
        """Sets how long after its last write a run expires, all its keys at once; None: not at all.

        One round trip. Each further write renews it, and a run with a live claim does not expire; a claim without a
        lease lives until it is ended.

        Args:
            run_id: as for `schedule_step`.
            ttl: seconds, up to ten years.

        Returns:
            Whether there is such a run.

        Raises:
            As `get_step_run`.
        """
        run = self._run(run_id)

        def parse(reply: Reply) -> bool:
            return reply[0] == b"set"

        return Call(
            run.text,
            script("expire_run"),
            run.keys[:2],
            (nonce(), arguments.milliseconds("ttl", ttl)),
            parse,
            lambda: False,
        )

    def delete_run(self, run_id: RunId, *, tombstone: Seconds = 3_600) -> Call[bool]:
        """Forgets a run. A tombstone refuses late writes for a while, so that none brings it back to life.

        One round trip. It also deletes a run that is corrupt or half evicted.

        Args:
            run_id: as for `schedule_step`.
            tombstone: seconds for which writes are refused with RunDeletedError.

        Returns:
            Whether there was such a run.

        Raises:
            As `get_step_run`.
        """
        run = self._run(run_id)

        def parse(reply: Reply) -> bool:
            return reply[0] == b"deleted"

        if cast("object", tombstone) is None:
            raise InvalidArgumentError("tombstone", "must be a number of seconds, not None")
        args = (token(), run.member, arguments.milliseconds("tombstone", tombstone))
        return Call(run.text, script("delete_run"), run.keys, args, parse)

    def batch(self, calls: Iterable[Call[T]]) -> Exchange[list[T | Exception]]:
        """Sends any mixture of operations, on any runs, in one round trip per server.

        They are not one transaction: each is atomic, and those of one run take effect in the order given.

        Args:
            calls: made by `store.calls`, such as `store.calls.begin_step("run", "step", {})`.

        Returns:
            For each call, in order, what the operation answers or the error it would have raised.

        Raises:
            InvalidArgumentError: one of the items is no call; nothing was sent.
            ServerError: the server could not be reached, or did not answer, before the store's `timeout`. After an
                OutcomeUnknownError any of the operations may have taken effect; sending the same calls again is safe.
        """
        items = check_calls(calls)
        return (yield items) if items else []
