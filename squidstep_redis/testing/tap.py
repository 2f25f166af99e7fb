"""The connections of a kit: redis-py's or fakeredis's own, with somebody who looks at what is sent, and may lose it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from inspect import isawaitable
from typing import Any, Protocol, cast

from redis.exceptions import ConnectionError, ResponseError

Command = list[bytes]


class Line(Protocol):
    """Who looks at what is sent."""

    def check(self) -> None:
        """Raises ConnectionError if nobody is there to connect to."""

    def hooks(self, commands: list[Command]) -> Iterable[Callable[[], object]]:
        """What is to be called before these commands are sent."""
        ...

    def strike(self, commands: list[Command]) -> tuple[list[Command], list[bool]]:
        """What to send in their place, and of each whether its reply is to be lost; raises if none is to be sent."""
        ...


class LoopGuard:
    """Closes what was opened in an event loop when that loop is shut down, as asyncio does with its generators.

    So a client can be made before there is a loop, serve one loop after another, and leave nothing open, whoever runs
    the loop: asyncio.run, pytest-asyncio, anyio.
    """

    def __init__(self, close: Callable[[], Awaitable[object]]) -> None:
        self._close = close
        self._guards: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}

    async def attach(self) -> None:
        """Looks after the running loop from now on."""
        loop = asyncio.get_running_loop()
        if loop not in self._guards:
            guard = self._guards[loop] = self._until_shutdown()
            await anext(guard)  # which makes it known to the loop

    async def _until_shutdown(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._guards.pop(asyncio.get_running_loop(), None)
            await self._close()

    def close(self) -> None:
        """Closes what is open in loops that are neither shut down nor running; a running one sees to it in the end."""
        for loop, guard in list(self._guards.items()):
            if not loop.is_closed() and not loop.is_running() and asyncio._get_running_loop() is None:
                loop.run_until_complete(guard.aclose())


def tap(connection_class: type[Any], line: Line) -> type[Any]:
    """A class of blocking connections on which `line` listens."""
    return type(f"Tapped{connection_class.__name__}", (_Tapped, connection_class), {"line": line})


def tap_asyncio(connection_class: type[Any], line: Line, guard: LoopGuard) -> type[Any]:
    """A class of asyncio connections on which `line` listens, and of which `guard` knows."""
    body = {"line": line, "guard": guard}
    return type(f"Tapped{connection_class.__name__}", (_TappedAsyncio, connection_class), body)


class _Taps:
    """What the two kinds of connection share."""

    line: Line
    _due: deque[bool]  # of each reply that is still to be read: whether it is to be lost

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._due = deque()
        super().__init__(*args, **kwargs)

    def _is_to_be_lost(self) -> bool:
        return bool(self._due) and self._due.popleft()


_LOST = "the reply was lost (by step_faults)"


class _Tapped(_Taps):
    def connect(self) -> None:
        try:
            self.line.check()
        except ConnectionError:
            self.disconnect()
            raise
        cast("Any", super()).connect()

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self._due.clear()
        cast("Any", super()).disconnect(*args, **kwargs)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        command = command if isinstance(command, str | bytes) else list(command)  # a generator can be read but once
        commands = split(command)
        for hook in self.line.hooks(commands):
            if isawaitable(hook()):
                raise TypeError(f"{hook} is asynchronous, and what it was to be called before is not")
        try:
            sent, losses = self.line.strike(commands)
        except BaseException:
            self.disconnect()
            raise
        cast("Any", super()).send_packed_command(command if sent == commands else join(sent), check_health)
        self._due.extend(losses)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_to_be_lost():
            return cast("Any", super()).read_response(*args, **kwargs)
        with suppress(ResponseError):
            cast("Any", super()).read_response(*args, **kwargs)  # so that the server has surely run it
        self.disconnect()
        raise ConnectionError(_LOST)


class _TappedAsyncio(_Taps):
    guard: LoopGuard

    async def connect(self) -> None:
        await self.guard.attach()
        try:
            self.line.check()
        except ConnectionError:
            await self.disconnect()
            raise
        await cast("Any", super()).connect()

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self._due.clear()
        await cast("Any", super()).disconnect(*args, **kwargs)

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        await self.guard.attach()
        command = command if isinstance(command, str | bytes) else list(command)
        commands = split(command)
        for hook in self.line.hooks(commands):
            answer = hook()
            if isawaitable(answer):
                await answer
        try:
            sent, losses = self.line.strike(commands)
        except BaseException:
            await self.disconnect()
            raise
        await cast("Any", super()).send_packed_command(command if sent == commands else join(sent), check_health)
        self._due.extend(losses)

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_to_be_lost():
            return await cast("Any", super()).read_response(*args, **kwargs)
        with suppress(ResponseError):
            await cast("Any", super()).read_response(*args, **kwargs)  # so that the server has surely run it
        await self.disconnect()
        raise ConnectionError(_LOST)


def split(packed: Any) -> list[Command]:
    """The commands in what redis-py has packed: bytes, or a list of pieces."""
    data = packed.encode() if isinstance(packed, str) else packed if isinstance(packed, bytes) else b"".join(packed)
    commands: list[Command] = []
    position = 0

    def number() -> int:  # behind a sign of its kind, "*" or "$"
        nonlocal position
        end = data.index(b"\r\n", position)
        found = int(data[position + 1 : end])
        position = end + 2
        return found

    while position < len(data):
        words: Command = []
        for _ in range(number()):
            size = number()
            words.append(data[position : position + size])
            position += size + 2
        commands.append(words)
    return commands


def join(commands: list[Command]) -> list[bytes]:
    """Packs commands."""
    return [
        b"".join((b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)))
        for words in commands
    ]
