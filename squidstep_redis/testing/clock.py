"""A clock that tests can advance: it shifts the server time and the key expiry that the store's scripts see.

When the clock is ahead, each script is sent with a prelude that wraps `redis.call` and `redis.pcall`. A script with a
prelude has its own digest, and only the stores of a kit send it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import Final

from squidstep_redis.protocol.scripts import names, script

# A key expires when the test clock says so, which may be before the server drops it. So the prelude adds the offset to
# each expiry that a script sets, and before each script deletes the keys that have expired by the test clock.
_PRELUDE: Final = """\
local server, ahead = redis, %d
for _, key in ipairs(KEYS) do
  local left = server.call("PTTL", key)
  if left >= 0 and left <= ahead then
    server.call("DEL", key)
  end
end
local function shifted(send, command, ...)
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
  call = function(...) return shifted(server.call, ...) end,
  pcall = function(...) return shifted(server.pcall, ...) end,
}, { __index = server })
"""


@cache
def _names() -> dict[bytes, str]:
    """The names of all scripts, by source and by digest."""
    known = [script(name) for name in names()]
    return {key: each.name for each in known for key in (each.source, each.sha)}


def script_of(command: list[bytes]) -> str | None:
    """Returns the name of the store's script that a command runs or loads; None for any other command.

    Args:
        command: the words of the command.
    """
    if command[0].upper() in (b"EVALSHA", b"EVAL") and len(command) > 1:
        return _names().get(command[1])
    if [word.upper() for word in command[:2]] == [b"SCRIPT", b"LOAD"]:
        return _names().get(command[2])
    return None


@lru_cache(1_024)
def _source(name: str, ahead_ms: int) -> bytes:
    """Returns the source of a script, with the prelude if the clock is ahead."""
    return (_PRELUDE % ahead_ms).encode() + script(name).source if ahead_ms else script(name).source


class StepClock:
    """A clock that runs ahead of the server's by the sum of all advances. Leases expire without sleeping.

    It applies to all stores of the kit, and to all commands sent through their clients. It controls leases, takeovers,
    `retry_in`, all times on records, `run_ttl`, `expire_run`, tombstones, `lapsed_claims` and `live_claims`.

    It does not control the timers of the process (heartbeats, pauses of `on_busy="wait"`, a store's `timeout`) or your
    own commands: `TTL` returns the server's value, which includes the offset, and an expired key remains until a store
    accesses it.
    """

    def __init__(self, server_time: Callable[[], tuple[int, int]]) -> None:
        """Makes a clock; only the kit does.

        Args:
            server_time: returns the server's time as seconds and microseconds.
        """
        self._server_time = server_time
        self._ahead_ms = 0

    def __repr__(self) -> str:
        return f"<StepClock {self._ahead_ms / 1_000:g} s ahead>"

    def advance(self, span: float | timedelta) -> None:
        """Moves the clock forward, for every call that is sent from now on.

        Args:
            span: seconds, or a timedelta; 0 or more. The clock cannot be set back.

        Raises:
            ValueError: the span is negative.
        """
        seconds = span.total_seconds() if isinstance(span, timedelta) else span
        if not seconds >= 0:
            raise ValueError(f"span: must be 0 or more seconds, or a timedelta, not {span!r}")
        self._ahead_ms += -int(-seconds * 1_000 // 1)  # rounded up, so that a lease with 0.4 ms left expires

    def advance_to(self, moment: datetime) -> None:
        """Moves the clock forward to a moment; does nothing if it has passed.

        Args:
            moment: a datetime with a time zone, such as `step_run.lease_ends_at`.
        """
        self.advance(max(timedelta(), moment - self.now()))

    def now(self) -> datetime:
        """Returns the current time of the clock, in UTC. One round trip."""
        seconds, microseconds = self._server_time()
        server = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds, microseconds=microseconds)
        return server + timedelta(milliseconds=self._ahead_ms)

    def shift(self, command: list[bytes]) -> list[bytes]:
        """Returns a command with the clock's offset in its script; other commands unchanged.

        Scripts are always sent in full. So each operation is one command, and no fault applies to an EVALSHA that the
        server rejects with NOSCRIPT.

        Args:
            command: the words of the command.
        """
        name = script_of(command)
        if name is None:
            return command
        source = _source(name, self._ahead_ms)
        if command[0].upper() == b"SCRIPT":
            return [*command[:2], source]
        return [b"EVAL", source, *command[2:]]
