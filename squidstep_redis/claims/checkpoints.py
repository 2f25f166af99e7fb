"""The checkpoint that the next extension of a claim carries. No I/O."""

from __future__ import annotations

from squidstep_redis.model import StepRun
from squidstep_redis.protocol.call import Call


class LazyCheckpoint:
    """The latest checkpoint that was made lazily: an extension that stores progress as well.

    The code under the claim writes only `latest`. The heartbeat, which may run in another thread, writes the rest. So
    neither can drop a checkpoint that was just made.

    Attributes:
        latest: the call; None if there is none.
    """

    latest: Call[StepRun] | None = None
    _taken: Call[StepRun] | None = None
    _stored: Call[StepRun] | None = None

    @property
    def pending(self) -> Call[StepRun] | None:
        """The latest checkpoint, unless it is known to be stored."""
        latest = self.latest
        return None if latest is self._stored else latest

    def take(self) -> Call[StepRun] | None:
        """Returns the pending checkpoint for the extension that is sent now."""
        self._taken = self.pending
        return self._taken

    def on_extended(self) -> None:
        """Records that the extension for which `take` was called has succeeded."""
        self._stored = self._taken or self._stored
