"""Opens the store that a command works on, and reads long runs from it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import click
import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry

from squidstep_redis import (
    Attempt,
    InvalidArgumentError,
    ServerError,
    SquidstepError,
    StepRun,
    StepRunStore,
    StoreSettings,
    UndecodablePayloadError,
)
from squidstep_redis.cli.options import StoreOptions
from squidstep_redis.cli.output import fail
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import opaque_calls

UNREACHABLE: Final = (RedisError, RedisClusterException)
"""The error that `open_store` raises when every node of a cluster is unreachable."""

_UNREADABLE: Final = (AttributeError, LookupError, TypeError, ValueError)  # what redis-py raises for such a reply

# For cluster clients. They match `StepRunStore.from_url`: the client does not retry, because the store does.
CLUSTER_OPTIONS: Final[dict[str, Any]] = {
    "protocol": 2,
    "socket_timeout": 3.0,
    "socket_connect_timeout": 1.5,
    **(
        {"retry": Retry(NoBackoff(), 0)}
        if int(redis.__version__.partition(".")[0]) >= 6
        else {"cluster_error_retry_attempts": 0}
    ),
}
_PAGE_SIZE: Final = 500  # steps; the server spends 2 to 3 ms on a page


@contextmanager
def open_store(options: StoreOptions, *, timeout: float | None = None) -> Generator[StepRunStore]:
    """Opens a store for the `with` block. If the server is a cluster node, the store uses the whole cluster.

    Args:
        options: The server, the key prefix and the codec.
        timeout: Seconds for one call; None: the default of stores. A server that refuses the first connection is
            reported at once.

    Raises:
        click.UsageError: The URL, the prefix or the codec is malformed.
        RedisError, RedisClusterException: The server refuses connections, or every node of the cluster is unreachable.
    """
    try:
        settings: StoreSettings = {"prefix": options.prefix, "codec": options.codec}
        if timeout is not None:
            settings["timeout"] = timeout
        store, is_cluster = _connect(options.url, settings)
    except InvalidArgumentError as error:
        problem = error.problem if error.argument == "url" else str(error)
        raise click.BadParameter(escaped(problem), param_hint=f"--{error.argument}") from error
    with store:
        if not is_cluster:
            yield store
            return
    connect: Any = redis.RedisCluster.from_url  # redis-py leaves parts of its types unknown
    try:
        cluster = connect(options.url, **CLUSTER_OPTIONS)
    except _UNREADABLE as error:
        problem = f"redis-py cannot read the reply to CLUSTER SLOTS: {type(error).__name__}: {error}"
        raise RedisClusterException(problem) from None
    with cluster:
        yield StepRunStore(cluster, prefix=options.prefix, codec=options.codec)


def _connect(url: str, settings: StoreSettings) -> tuple[StepRunStore, bool]:
    """Returns a store that has connected to the server, and whether the server is a node of a cluster."""
    store = StepRunStore.from_url(url, **settings)
    try:
        return store, _is_cluster(store.client)
    except BaseException:
        store.close()
        raise


@contextmanager
def store_or_exit(options: StoreOptions) -> Generator[StepRunStore]:
    """Opens a store for the `with` block. An error in the block exits the program with one line on stderr.

    The exit code is 2 if the server failed or an argument is invalid, and 1 for any other error of the store.
    """
    try:
        with open_store(options) as store:
            yield store
    except (ServerError, *UNREACHABLE) as error:
        fail(str(error), 2)
    except InvalidArgumentError as error:
        raise click.UsageError(escaped(str(error))) from error
    except SquidstepError as error:
        fail(str(error), 1)


def read_steps(store: StepRunStore, run: str) -> list[StepRun]:
    """Returns the step runs of a run in creation order. It reads page by page, so that workers are not blocked."""
    found: dict[str, StepRun] = {}
    cursor: str | None = None
    while True:
        page = store.scan_steps(run, limit=_PAGE_SIZE, cursor=cursor)
        found |= {each.step: each for each in page.step_runs}
        cursor = page.cursor
        if cursor is None:
            return sorted(found.values(), key=lambda each: each.position)


def read_attempts(store: StepRunStore, run: str, steps: list[str]) -> list[list[Attempt]]:
    """Returns the attempts of each of these steps. An error that cannot be decoded does not hide them."""
    found: list[Any] = store.batch([store.calls.attempts(run, step) for step in steps])
    opaque = opaque_calls(store.calls.prefix)
    for index, attempts in enumerate(found):
        if isinstance(attempts, UndecodablePayloadError):
            found[index] = store.send(opaque.attempts(run, steps[index]))
        elif isinstance(attempts, Exception):
            raise attempts
    return found


def _is_cluster(client: Any) -> bool:
    """Whether the server returns cluster slots. A single server returns an error, and so may its ACL.

    Raises:
        redis.ConnectionError: There is no connection. A subclass says that there is one: the store handles it.
    """
    try:
        slots = client.execute_command("CLUSTER SLOTS")
    except UnicodeError as error:  # for an invalid host name
        raise redis.ConnectionError(f"The name of the server's host is not valid: {error}") from None
    except _UNREADABLE:
        return False
    except UNREACHABLE as error:
        if type(error) is redis.ConnectionError:
            raise
        return False
    if not slots:
        raise RedisClusterException("none of its slots is served: check CLUSTER NODES")
    return True
