"""Live updates: one task per watched subject polls the store for all its viewers, and none polls without a viewer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from typing import Final, Generic, TypeVar

from redis.exceptions import RedisError

from squidstep_redis import RunExplanation, SquidstepError
from squidstep_redis.web.reads import Overview

_logger: Final = logging.getLogger("squidstep_redis.web")

MAX_VIEWERS: Final = 200
_INTERVAL: Final = 1.0  # seconds between two polls of a subject
_SHARE: Final = 20  # a poll is followed by a pause of this many times its duration, so that it uses 5 % of the time
_STREAM_SECONDS: Final = 30.0  # a stream ends, and the browser reconnects: rights are checked, and servers can stop
_HEARTBEAT: Final = 10.0  # seconds; an ASGI server may notice only when it sends that a client has left
_RECONNECT_MS: Final = 500
_REFRESH: Final = 15  # seconds, after which the ages on a page of something unfinished are renewed

_RECENT: Final = 2.0  # seconds

Read = Callable[[], Awaitable[str]]
T = TypeVar("T")


class TooManyViewersError(Exception):
    """The application already serves its maximum number of streams."""


def version_of_overview(seen: Overview) -> str:
    """Returns a text that changes when the overview does."""
    store = seen.store
    claims = [
        (each.run_id, each.step, each.attempt, each.lease_ends_at)
        for each in (*store.lapsed_claims, *store.live_claims)
    ]
    failures = [(group.type, len(group.step_runs), group.step_runs[0].ended_at) for group in seen.groups]
    runs = [(each.run_id, each.changed_at, each.cancel_reason) for each in store.runs]
    return _digest((seen.counts, store.total, claims, failures, runs, int(seen.read_at.timestamp()) // _REFRESH))


def version_of_run(explained: RunExplanation | None) -> str:
    """Returns a text that changes when the page of a run does."""
    if explained is None:
        return "missing"
    summary = explained.summary
    steps = [(each.step, each.reason, each.attempt, each.until, each.owner) for each in explained.steps]
    # Ages matter only while something is unfinished.
    refresh = int(explained.read_at.timestamp()) // _REFRESH if not summary.is_over else 0
    return _digest((sorted(summary.counts.items()), summary.changed_at, summary.cancel_reason, steps, refresh))


def _digest(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()[:16]


class Latest(Generic[T]):
    """The newest result of an expensive read: updates that viewers request at the same time share one."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._newest: tuple[float, T] | None = None
        self._reading: dict[asyncio.AbstractEventLoop, asyncio.Task[T]] = {}

    async def fresh(self) -> T:
        """Reads now: the result contains everything that was changed before this call."""
        began = time.monotonic()
        result = await self._read()
        if self._newest is None or self._newest[0] < began:
            self._newest = began, result
        return result

    async def recent(self) -> T:
        """Returns a result that is at most two seconds old, or joins a read in progress, or starts one."""
        if self._newest is not None and time.monotonic() - self._newest[0] <= _RECENT:
            return self._newest[1]
        loop = asyncio.get_running_loop()
        task = self._reading.get(loop)
        if task is None:
            task = self._reading[loop] = loop.create_task(self.fresh())
            task.add_done_callback(lambda _: self._reading.pop(loop))
        return await asyncio.shield(task)  # the others wait for it, too


class _Subject:
    """Something that is polled while it has viewers."""

    def __init__(self, read: Read) -> None:
        self.viewers = 0
        self.version: str | None = None
        self.changed = asyncio.Event()
        self._read = read
        self._task = asyncio.create_task(self._poll())

    def stop(self) -> None:
        self._task.cancel()

    async def _poll(self) -> None:
        while True:
            began = time.monotonic()
            try:
                version = await self._read()
            except (SquidstepError, RedisError) as error:
                version = f"error-{type(error).__name__}"
            except Exception:  # the viewers must not wait for a task that has ended
                _logger.exception("a live update failed")
                version = "error"
            if version != self.version:
                self.version = version
                self.changed.set()
                self.changed = asyncio.Event()
            await asyncio.sleep(max(_INTERVAL, _SHARE * (time.monotonic() - began)))


class Hub:
    """The subjects that are being watched, on any number of event loops."""

    def __init__(self) -> None:
        self._subjects: dict[tuple[asyncio.AbstractEventLoop, str], _Subject] = {}
        self._viewers = 0

    @property
    def polled(self) -> int:
        """Number of subjects that are being polled."""
        return len(self._subjects)

    def stream(self, subject: str, known: str, read: Read) -> AsyncIterator[str]:
        """Returns server-sent events: one for each change of a subject, and comments in between.

        Args:
            subject: the name of what is watched: viewers of the same subject share its polls.
            known: the version that the viewer has.
            read: reads the version.

        Raises:
            TooManyViewersError: the application serves no further stream.
        """
        if self._viewers >= MAX_VIEWERS:
            raise TooManyViewersError
        return self._stream(subject, known, read)

    async def _stream(self, name: str, known: str, read: Read) -> AsyncIterator[str]:
        key = (asyncio.get_running_loop(), name)
        subject = self._subjects.get(key)
        if subject is None:
            subject = self._subjects[key] = _Subject(read)
        subject.viewers += 1
        self._viewers += 1
        ends = time.monotonic() + _STREAM_SECONDS
        try:
            yield f"retry: {_RECONNECT_MS}\n\n"
            while (left := ends - time.monotonic()) > 0:
                changed = subject.changed
                if subject.version not in (None, known):
                    known = str(subject.version)
                    yield f"id: {known}\nevent: change\ndata: {known}\n\n"
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), min(_HEARTBEAT, left))
                except TimeoutError:
                    yield ": unchanged\n\n"
        finally:
            self._viewers -= 1
            subject.viewers -= 1
            if not subject.viewers:
                del self._subjects[key]
                subject.stop()
