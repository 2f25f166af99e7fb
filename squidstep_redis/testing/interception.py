"""Connection classes of redis-py or fakeredis whose commands and replies an interceptor can change or lose."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from inspect import isawaitable
from typing import Any, Protocol, cast

from redis.exceptions import ConnectionError, ResponseError

Command = list[bytes]


class Interceptor(Protocol):
    """Sees the commands that are about to be sent in one go, and decides what is sent and which replies are lost."""

    def check(self) -> None:
        """Raises ConnectionError if the server is to appear unreachable."""

    def hooks(self, commands: list[Command]) -> Iterable[Callable[[], object]]:
        """Returns the functions to call before the commands are sent."""
        ...

    def intercept(self, commands: list[Command]) -> tuple[list[Command], list[bool]]:
        """Returns the commands to send instead, and for each whether its reply is lost. Raises to send nothing."""
        ...


class LoopGuard:
    """Closes a client's connections when the event loop that opened them shuts down its asynchronous generators.

    So a client can be made before a loop exists, and can be used in several loops one after another, under
    asyncio.run, pytest-asyncio or anyio.
    """

    def __init__(self, close: Callable[[], Awaitable[object]]) -> None:
        """Makes a guard that watches no loop yet.

        Args:
            close: closes the connections; called in the loop that shuts down.
        """
        self._close = close
        self._guards: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}

    async def attach(self) -> None:
        """Watches the running loop from now on."""
        loop = asyncio.get_running_loop()
        if loop not in self._guards:
            guard = self._guards[loop] = self._until_shutdown()
            await anext(guard)  # registers the generator with the loop

    async def _until_shutdown(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._guards.pop(asyncio.get_running_loop(), None)
            await self._close()

    def close(self) -> None:
        """Closes the connections of idle loops. A running loop closes its own when it ends."""
        for loop, guard in list(self._guards.items()):
            if not loop.is_closed() and not loop.is_running() and asyncio._get_running_loop() is None:
                loop.run_until_complete(guard.aclose())


def intercepted(connection_class: type[Any], interceptor: Interceptor) -> type[Any]:
    """Returns a subclass of a blocking connection class whose traffic passes through an interceptor.

    Args:
        connection_class: the class of redis-py or fakeredis.
        interceptor: decides what is sent and lost.
    """
    body = {"interceptor": interceptor}
    return type(f"Intercepted{connection_class.__name__}", (_Intercepted, connection_class), body)


def intercepted_asyncio(connection_class: type[Any], interceptor: Interceptor, guard: LoopGuard) -> type[Any]:
    """Returns a subclass of an asyncio connection class whose traffic passes through an interceptor.

    Args:
        connection_class: the class of redis-py or fakeredis.
        interceptor: decides what is sent and lost.
        guard: watches each loop that opens a connection.
    """
    body = {"interceptor": interceptor, "guard": guard}
    return type(f"Intercepted{connection_class.__name__}", (_InterceptedAsyncio, connection_class), body)


class _Base:
    """Shared by blocking and asyncio connections."""

    interceptor: Interceptor
    _losses: deque[bool]  # for each reply not yet read: whether it is lost

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._losses = deque()
        super().__init__(*args, **kwargs)

    def _loses_next_reply(self) -> bool:
        return bool(self._losses) and self._losses.popleft()


_LOST = "the reply was lost (by step_faults)"


class _Intercepted(_Base):
    def connect(self) -> None:
        try:
            self.interceptor.check()
        except ConnectionError:
            self.disconnect()
            raise
        cast("Any", super()).connect()

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self._losses.clear()
        cast("Any", super()).disconnect(*args, **kwargs)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        command, commands = _unpacked(command)
        for hook in self.interceptor.hooks(commands):
            if isawaitable(hook()):
                raise TypeError(f"hook: {hook} is asynchronous, but the store is blocking; pass a plain function")
        try:
            sent, losses = self.interceptor.intercept(commands)
        except BaseException:
            self.disconnect()
            raise
        cast("Any", super()).send_packed_command(command if sent == commands else _packed(sent), check_health)
        self._losses.extend(losses)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        if not self._loses_next_reply():
            return cast("Any", super()).read_response(*args, **kwargs)
        with suppress(ResponseError):
            cast("Any", super()).read_response(*args, **kwargs)  # waits until the server has run it
        self.disconnect()
        raise ConnectionError(_LOST)


class _InterceptedAsyncio(_Base):
    guard: LoopGuard

    async def connect(self) -> None:
        await self.guard.attach()
        try:
            self.interceptor.check()
        except ConnectionError:
            await self.disconnect()
            raise
        await cast("Any", super()).connect()

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self._losses.clear()
        await cast("Any", super()).disconnect(*args, **kwargs)

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        await self.guard.attach()
        command, commands = _unpacked(command)
        for hook in self.interceptor.hooks(commands):
            result = hook()
            if isawaitable(result):
                await result
        try:
            sent, losses = self.interceptor.intercept(commands)
        except BaseException:
            await self.disconnect()
            raise
        await cast("Any", super()).send_packed_command(command if sent == commands else _packed(sent), check_health)
        self._losses.extend(losses)

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        if not self._loses_next_reply():
            return await cast("Any", super()).read_response(*args, **kwargs)
        with suppress(ResponseError):
            await cast("Any", super()).read_response(*args, **kwargs)  # waits until the server has run it
        await self.disconnect()
        raise ConnectionError(_LOST)


def _unpacked(packed: Any) -> tuple[Any, list[Command]]:
    """Returns data that redis-py has packed, with a generator read into a list, and the commands in it.

    Args:
        packed: a string, bytes, or an iterable of byte strings.
    """
    packed = packed if isinstance(packed, str | bytes) else list(packed)
    data = packed.encode() if isinstance(packed, str) else packed if isinstance(packed, bytes) else b"".join(packed)
    commands: list[Command] = []
    position = 0

    def number() -> int:  # reads the number after "*" or "$"
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
    return packed, commands


def _packed(commands: list[Command]) -> list[bytes]:
    """Packs commands, each into one byte string.

    Args:
        commands: the commands, as lists of words.
    """
    return [
        b"".join((b"*%d\r\n" % len(words), *(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)))
        for words in commands
    ]
