"""A clock that tests move: what a script of the store takes for the server's time, and for a key that has expired.

The scripts are sent as they are, behind a prelude which stands between them and the server. A script with a prelude is
another script; a store that is not of a kit never sends one.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import Final

from squidstep_redis.protocol.scripts import directory, script

# A key of the store is over when the moved clock says so, which may be before the server drops it: what expires is
# written down by the moved clock, and looked at before each script, as a server looks at keys that are asked for.
_PRELUDE: Final = """\
local server, ahead = redis, %d
for _, key in ipairs(KEYS) do
  local left = server.call("PTTL", key)
  if left >= 0 and left <= ahead then
    server.call("DEL", key)
  end
end
local function moved(send, command, ...)
  if command == "TIME" then
    local time = send("TIME")
    local micros = time[2] + ahead %% 1000 * 1000
    local seconds = time[1] + math.floor(ahead / 1000) + math.floor(micros / 1000000)
    return { string.format("%%d", seconds), string.format("%%d", micros %% 1000000) }
  elseif command == "PEXPIRE" then
    local key, span = ...
    return send("PEXPIRE", key, span + ahead)
  end
  return send(command, ...)
end
local redis = setmetatable({
  call = function(...) return moved(server.call, ...) end,
  pcall = function(...) return moved(server.pcall, ...) end,
}, { __index = server })
"""


@cache
def _names() -> dict[bytes, str]:
    """Which script it is, by its source and by its digest."""
    known = [script(path.stem) for path in directory().glob("*.lua")]
    return {key: each.name for each in known for key in (each.source, each.sha)}


def script_of(command: list[bytes]) -> str | None:
    """The name of the store's script that a command runs or loads; None if it is another command."""
    if command[0].upper() in (b"EVALSHA", b"EVAL") and len(command) > 1:
        return _names().get(command[1])
    if [word.upper() for word in command[:2]] == [b"SCRIPT", b"LOAD"]:
        return _names().get(command[2])
    return None


@lru_cache(1_024)
def _source(name: str, ahead_ms: int) -> bytes:
    """A script, behind the prelude if the clock is ahead."""
    return (_PRELUDE % ahead_ms).encode() + script(name).source if ahead_ms else script(name).source


class StepClock:
    """The clock of a kit: ahead of the server's by what it was advanced. Leases end by it without anybody sleeping.

    It moves for all stores of the kit, and for whatever is sent through their clients. What goes by it: leases,
    takeovers, `retry_in`, all times on records, `run_ttl`, `expire_run`, tombstones, `lapsed_claims`, `live_claims`.

    What does not: the timers of the process (heartbeats, pauses of `on_busy="wait"`, a store's `timeout`), and commands
    of your own (`TTL` shows more by what the clock is ahead, and a key that is over stays until a store looks at it).
    """

    def __init__(self, server_time: Callable[[], tuple[int, int]]) -> None:
        """Made by the kit alone; `server_time` asks the server for seconds and microseconds."""
        self._server_time = server_time
        self._ahead_ms = 0

    def __repr__(self) -> str:
        return f"<StepClock {self._ahead_ms / 1_000:g} s ahead>"

    def advance(self, span: float | timedelta) -> None:
        """Moves the clock forward, for every call that is sent from now on.

        Args:
            span: seconds, or a timedelta. A clock that is set back is not to be had: leases would last.

        Raises:
            ValueError: it is less than nothing.
        """
        seconds = span.total_seconds() if isinstance(span, timedelta) else span
        if not seconds >= 0:
            raise ValueError(f"span: must be seconds from 0 or a timedelta, not {span!r}")
        self._ahead_ms += -int(-seconds * 1_000 // 1)  # up: a lease of which 0.4 ms are left is to be over

    def advance_to(self, moment: datetime) -> None:
        """Moves the clock forward to a moment; if that has passed, not at all.

        Args:
            moment: aware, such as `step_run.lease_ends_at`.
        """
        self.advance(max(timedelta(), moment - self.now()))

    def now(self) -> datetime:
        """What the clock shows, in UTC. One round trip."""
        seconds, microseconds = self._server_time()
        server = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds, microseconds=microseconds)
        return server + timedelta(milliseconds=self._ahead_ms)

    def moved(self, command: list[bytes]) -> list[bytes]:
        """What to send in place of a command, for the kit's own connections: a script always in full.

        So that an operation is one command: a fault is not to strike a first one that the server answers NOSCRIPT.
        """
        name = script_of(command)
        if name is None:
            return command
        source = _source(name, self._ahead_ms)
        if command[0].upper() == b"SCRIPT":
            return [*command[:2], source]
        return [b"EVAL", source, *command[2:]]
