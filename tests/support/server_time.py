"""Calls for which the server has a time that the test chooses."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from squidstep_redis import Call

T = TypeVar("T")

# As on a real server, the microseconds are not padded.
_PRELUDE = """\
local server = redis
local function call(name, ...)
  if name == "TIME" then
    return { "%d", "%d" }
  end
  return server.call(name, ...)
end
local redis = setmetatable({ call = call }, { __index = server })
"""


def at(call: Call[T], seconds: int, microseconds: int = 0) -> Call[T]:
    """Returns the call with a script for which this is the server's time.

    Args:
        call: made by `store.calls`.
        seconds: since 1970.
        microseconds: of the second, from 0 to 999,999.
    """
    source = _PRELUDE.encode() % (seconds, microseconds) + call.script.source
    sha = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()
    return call._replace(script=call.script._replace(source=source, sha=sha))
