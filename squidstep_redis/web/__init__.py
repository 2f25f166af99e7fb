"""A web page about the store, as an ASGI application: what is running, what is stuck and why, what has failed.

`web_app` makes it; mount it in your application, or serve it with `squidstep web`. It needs the extra `web`.
`tests/guide/web.md` is the guide.
"""

from __future__ import annotations

try:
    from squidstep_redis.web.app import web_app
except ModuleNotFoundError as missing:
    problem = "squidstep_redis.web needs Starlette and Jinja: pip install 'squidstep_redis[web]'"
    raise ModuleNotFoundError(problem, name=missing.name) from missing

from squidstep_redis.web.settings import Authorize, Right

__all__ = ["Authorize", "Right", "web_app"]
