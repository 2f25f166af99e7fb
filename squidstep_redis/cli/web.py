"""`squidstep web`: serves the web page."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

import click
import uvicorn
from redis import RedisCluster
from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from squidstep_redis import AsyncStepRunStore
from squidstep_redis.cli.connect import CLUSTER_OPTIONS, store_or_exit
from squidstep_redis.cli.options import StoreOptions, store_options
from squidstep_redis.cli.output import fail, print_line
from squidstep_redis.web import web_app

_TIMEOUT: Final = 3.0  # seconds, so that a page soon reports an unreachable server
_SHUTDOWN_SECONDS: Final = 1  # for which open streams and requests may continue


@click.command("web", epilog="Example: squidstep web --payloads --actions")
@store_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    default=8421,
    show_default=True,
    type=click.IntRange(0, 65_535),
    help="The port to listen on; 0: a free one.",
)
@click.option("--payloads", is_flag=True, help="Show inputs, outputs, progress and whole errors.")
@click.option("--actions", is_flag=True, help="Let steps be retried and released, and runs cancelled and resumed.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="An additional host name under which the page is served.",
)
def web_command(
    options: StoreOptions, host: str, port: int, payloads: bool, actions: bool, hosts: tuple[str, ...]
) -> None:
    """Serves a web page of the store.

    It shows what is running, what is stuck and why, what has failed, and each run. By default, only this machine can
    reach it, and it shows no payloads and changes nothing. It asks for no password: to share it, mount
    squidstep_redis.web into an application that has users. Control-C stops it.
    """
    with store_or_exit(options) as store:
        is_cluster = isinstance(store.client, RedisCluster)
    try:
        listening = listen(host, port)
    except (OSError, UnicodeError) as error:  # the latter for an invalid host name
        fail(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}", 1)
    with listening:
        address, port = listening.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            can = "see payloads and change runs" if payloads and actions else "change runs" if actions else "see it"
            sys.stderr.write(f"squidstep: warning: anyone who can reach {address}, port {port}, can {can}\n")
        print_line(f"Serving http://{f'[{host}]' if ':' in host else host}:{port}/  (Control-C stops it)")
        sys.stdout.flush()
        app_settings = {"payloads": payloads, "actions": actions, "hosts": {host, *hosts}, "title": options.server}
        asyncio.run(_serve(options, is_cluster, listening, app_settings))


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket; raises OSError if it cannot listen."""
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # This applies to the connections that it accepts. asyncio sets it only if the socket was made with TCP's number.
    # Without it, a page waits 40 ms between its head and its body.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


async def _serve(
    options: StoreOptions, is_cluster: bool, listening: socket.socket, app_settings: dict[str, Any]
) -> None:
    async with _opened(options, is_cluster) as store:
        config = uvicorn.Config(
            web_app(store, **app_settings),
            log_level="critical",
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
        await uvicorn.Server(config).serve(sockets=[listening])


@asynccontextmanager
async def _opened(options: StoreOptions, is_cluster: bool) -> AsyncGenerator[AsyncStepRunStore]:
    """Provides the asyncio store of these options."""
    if not is_cluster:
        async with AsyncStepRunStore.from_url(
            options.url, prefix=options.prefix, codec=options.codec, timeout=_TIMEOUT
        ) as store:
            yield store
        return
    cluster: Any = redis_asyncio.RedisCluster
    retry = {"retry": Retry(NoBackoff(), 0)} if "retry" in CLUSTER_OPTIONS else {}
    async with cluster.from_url(options.url, **CLUSTER_OPTIONS | retry) as client:
        yield AsyncStepRunStore(client, prefix=options.prefix, codec=options.codec, timeout=_TIMEOUT)
