"""Measures how long the pages of a large store take over HTTP, and how long the server makes other clients wait."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Final, NamedTuple

import redis

_PAGES: Final = {
    "the overview": "/",
    "runs": "/runs",
    "runs by status, pending": "/runs?status=pending",
    "runs by status, failed": "/runs?status=failed",
    "runs by label": "/runs?label=tenant%3Dacme",
    "runs by prefix": "/runs?q=run-9999",
    "failed steps": "/failed",
}
_PING_EVERY: Final = 0.0005


class Page(NamedTuple):
    """One page of the web page.

    Attributes:
        what: which.
        seconds: the median of its durations.
        ping: 99 % of the PINGs that another process sent meanwhile took at most so many seconds.
    """

    what: str
    seconds: float
    ping: float


def pages(port: int, requests: int) -> Iterator[Page]:
    """Serves the store of a Redis server with `squidstep web`, and requests each page so many times.

    Args:
        port: the Redis server's port on loopback.
        requests: how many times.
    """
    command = [sys.executable, "-m", "squidstep_redis.cli", "web", "-u", f"redis://127.0.0.1:{port}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as serving:
        try:
            assert serving.stdout is not None
            line = serving.stdout.readline()
            address = re.search(r"http://([\d.]+):(\d+)/", line)
            assert address is not None, line
            with contextlib.closing(http.client.HTTPConnection(address[1], int(address[2]), timeout=60)) as client:
                for what, path in _PAGES.items():
                    with _pinging(port) as pings:
                        durations = [_get(client, path) for _ in range(requests)]
                    yield Page(what, median(durations), quantiles(pings, n=100)[-1])
        finally:
            serving.terminate()


def _get(client: http.client.HTTPConnection, path: str) -> float:
    start = time.monotonic()
    client.request("GET", path)
    response = client.getresponse()
    response.read()
    assert response.status == 200, f"{path}: {response.status}"
    return time.monotonic() - start


@contextlib.contextmanager
def _pinging(port: int) -> Iterator[list[float]]:
    """Sends PINGs in another process; after the block, the list has their durations."""
    durations: list[float] = []
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_ping, args=(port, there))
    process.start()
    here.recv()
    yield durations
    here.send("end")
    durations += here.recv()
    process.join()


def _ping(port: int, parent: Connection) -> None:
    os.nice(-5 if os.geteuid() == 0 else 0)  # it is not to wait for the client and the page
    with redis.Redis(port=port) as client:
        client.ping()
        parent.send("ready")
        durations: list[float] = []
        while not parent.poll():
            start = time.monotonic()
            client.ping()
            durations.append(time.monotonic() - start)
            time.sleep(_PING_EVERY)
        parent.send(durations)
