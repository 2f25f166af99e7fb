"""Deliberate defects of the asyncio transport. The soak of cancellations must find each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from redis.exceptions import RedisError

from squidstep_redis import Call
from squidstep_redis.transport.link import Link
from squidstep_redis.transport.retry import RoundTripError

from . import cancellations


def give_replies_to_the_next_call() -> None:
    """A cancelled call's reply goes to the next call that runs the same script, and nonces are not compared."""
    kinds: WeakKeyDictionary[asyncio.Future[list[Any]], bytes] = WeakKeyDictionary()

    def submit_and_swap(link: Any, data: bytes, *args: Any) -> asyncio.Future[list[Any]]:
        def swap(future: asyncio.Future[list[Any]]) -> None:
            sent = [round_trip.future for round_trip in link._sent]
            if future.cancelled() and future in sent[:-1]:
                index = sent.index(future)
                if kinds[future] == kinds[sent[index + 1]]:
                    link._sent[index], link._sent[index + 1] = link._sent[index + 1], link._sent[index]

        future = submit(link, data, *args)
        kinds[future] = data[:80]  # EVALSHA and the script's hash
        future.add_done_callback(swap)
        return future

    submit = Link.submit
    Link.submit = submit_and_swap
    call_type: Any = Call
    call_type.words_of = lambda _, reply: reply.split(b" ", 2) if isinstance(reply, bytes) else reply


def take_lost_calls_for_unsent() -> None:
    """An error says that nothing was sent, although the connection was lost after that."""

    def fail(link: Any, error: RedisError) -> None:
        for round_trip in link._sent:
            if not round_trip.future.done():
                round_trip.future.set_exception(RoundTripError(error, sent=False))
        original(link, error)

    original = Link._fail
    Link._fail = fail


DEFECTS: dict[str, Callable[[], None]] = {
    defect.__name__: defect for defect in (give_replies_to_the_next_call, take_lost_calls_for_unsent)
}


def work(defect: str, url: str, log: Path, seed: int, number: int, lua: str | None) -> None:
    """Runs a worker whose transport has a defect."""
    DEFECTS[defect]()
    cancellations.work(url, log, seed, number, lua)


def with_defect(defect: str) -> Callable[..., None]:
    """Returns what a worker's process runs."""
    return partial(work, defect)
