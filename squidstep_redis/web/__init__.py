"""A web page about the store, as an ASGI application: what is running, what is stuck and why, what has failed.

`web_app` makes it; mount it in your application, or serve it with `squidstep web`. It needs the extra `web`.
`tests/guide/web.md` is the guide.
"""

from __future__ import annotations

from squidstep_redis.web.app import web_app
from squidstep_redis.web.settings import Authorize, Right

__all__ = ["Authorize", "Right", "web_app"]
