"""What a type checker sees of the web page: pyright checks this file, and nothing runs it."""

from typing import assert_type

from starlette.applications import Starlette
from starlette.requests import Request

from squidstep_redis import AsyncStepRunStore
from squidstep_redis.web import Authorize, Right, web_app


def of_function(request: Request, right: Right) -> bool:
    return right == "see" and request.url.path == "/"


async def of_coroutine(request: Request, right: Right) -> bool:
    return of_function(request, right)


hooks: list[Authorize] = [of_function, of_coroutine]
store = AsyncStepRunStore.from_url("redis://localhost")
for hook in hooks:
    assert_type(web_app(store, payloads=True, actions=True, authorize=hook, hosts=["a"], secret="s" * 16), Starlette)
