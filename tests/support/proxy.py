"""A TCP proxy between a client and a real server: it counts round trips, and loses messages as a network may."""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from squidstep_redis.protocol.scripts import script as find_script

# The commands that clients send when they connect: forwarded, and neither counted nor lost.
HANDSHAKE = frozenset({b"AUTH", b"CLIENT", b"CLUSTER", b"COMMAND", b"HELLO", b"INFO", b"PING", b"READONLY", b"SELECT"})


@dataclass(frozen=True, slots=True)
class Fault:
    """A change to the messages of one command.

    Attributes:
        request: returns the part of the request that the server receives; if it is changed, the connection is closed.
        reply: returns the reply that the client receives; if it is empty, the connection is closed.
        script: the fault applies to the next call of this script; None: to the next command.
    """

    request: Callable[[bytes], bytes] = bytes
    reply: Callable[[bytes], bytes] = bytes
    script: str | None = None

    def applies_to(self, command: list[bytes]) -> bool:
        if self.script is None:
            return True
        wanted = find_script(self.script)
        return command[1:2] in ([wanted.sha], [wanted.source])


class Proxy:
    """Forwards one command at a time to a server, so that tests can act between two commands.

    Attributes:
        port: the port of the proxy, on loopback.
        commands: the commands that arrived, lost ones included, as lists of words.
        round_trips: how often a client sent commands after its last reply. A batch that is sent in several pieces
            counts as one only inside of `batches`, which waits for the last piece.
        server: the path of a unix socket, or host and port: new connections lead there.
        translate: changes each reply, before a fault does.
    """

    def __init__(self, server: str | tuple[str, int]) -> None:
        self.server = server
        self.translate: Callable[[bytes], bytes] = bytes
        self.clear()
        self._batches: deque[int] = deque()
        self._faults: deque[Fault] = deque()
        self._held: list[threading.Event] = []
        self._hooks: dict[int, Callable[[], object]] = {}
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._placeholder = socket.socket()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    @classmethod
    def to(cls, client: Any) -> Self:
        options = client.connection_pool.connection_kwargs  # of redis-py, blocking or asyncio
        return cls(options.get("path") or (options["host"], options["port"]))

    def clear(self) -> None:
        self.commands: list[list[bytes]] = []
        self.round_trips = 0

    def names(self) -> list[str]:
        return [command[0].decode().upper() for command in self.commands]

    def add_fault(self, fault: Fault) -> None:
        """Adds a fault after the pending ones."""
        self._faults.append(fault)

    def drop(self, times: int = 1, script: str | None = None) -> None:
        """Lets the server run the next commands, and closes the connection instead of delivering their replies."""
        self._faults.extend([Fault(reply=lambda _: b"", script=script)] * times)

    def cut(self, times: int = 1, script: str | None = None) -> None:
        """Closes the connection when the next commands arrive; the server never receives them."""
        self._faults.extend([Fault(request=lambda _: b"", script=script)] * times)

    def tear(self, times: int = 1, script: str | None = None) -> None:
        """Closes the connection when the server has received half of each of the next commands."""
        self._faults.extend([Fault(request=lambda request: request[: len(request) // 2], script=script)] * times)

    def replace_replies(self, *replies: bytes) -> None:
        """Lets the server run the next commands, and delivers these replies instead of its own."""
        self._faults.extend(Fault(reply=lambda _, reply=reply: reply) for reply in replies)

    def hold_requests(self, times: int = 1, script: str | None = None) -> threading.Event:
        """Delays the next commands until the event is set."""
        released = threading.Event()
        self._faults.extend([Fault(request=self._gate(released), script=script)] * times)
        return released

    def hold_replies(self, times: int = 1, script: str | None = None) -> threading.Event:
        """Lets the server run the next commands, and delays their replies until the event is set."""
        released = threading.Event()
        self._faults.extend([Fault(reply=self._gate(released), script=script)] * times)
        return released

    def _gate(self, released: threading.Event) -> Callable[[bytes], bytes]:
        self._held.append(released)

        def wait(data: bytes) -> bytes:
            released.wait()
            return data

        return wait

    def refuse_after_reply(self, script: str | None = None) -> None:
        """Loses the reply of the next command, and refuses connections from then on."""

        def refuse(_: bytes) -> bytes:
            self.refuse()
            return b""

        self._faults.append(Fault(reply=refuse, script=script))

    def refuse(self) -> None:
        """Refuses connections from now on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
            # The port is free now. If another test's server got it, the clients of this one would reach that.
            self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._placeholder.bind(("127.0.0.1", self.port))

    def disconnect(self) -> None:
        """Closes all connections."""
        for each in self._sockets:
            with contextlib.suppress(OSError):  # it is already closed
                each.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Resets all connections, as a firewall or a server that has crashed does: they do not end regularly."""
        for each in self._sockets:
            with contextlib.suppress(OSError):  # it is already closed
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RD)

    def heal(self) -> None:
        """Removes the pending faults."""
        self._faults.clear()

    def after(self, count: int, hook: Callable[[], object]) -> None:
        """Calls the hook after the server has run `count` more commands, before it receives the next."""
        self._hooks[len(self.commands) + count] = hook

    @contextlib.contextmanager
    def batches(self, *sizes: int) -> Iterator[None]:
        """In the block, replies wait for batches of these sizes, in EVAL and EVALSHA; a fault affects a whole batch."""
        self._batches.extend(sizes)
        try:
            yield
            assert not self._batches, f"of the batches {sizes}, {list(self._batches)} did not arrive"
        finally:
            self._batches.clear()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.refuse()
        self._threads.pop(0).join()
        self._listener.close()
        self._placeholder.close()
        self.disconnect()
        for released in self._held:
            released.set()
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # replies to a batch are sent one by one
                server = socket.socket(socket.AF_UNIX if isinstance(self.server, str) else socket.AF_INET)
                self._sockets += [client, server]
                self._start(self._serve, client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError, EOFError):
            server.connect(self.server)
            with client.makefile("rb") as requests, server.makefile("rb") as replies:
                held: list[bytes] = []
                while command := words(request := frame(requests)):
                    if command[0].upper() in HANDSHAKE:
                        server.sendall(request)
                        client.sendall(frame(replies))
                        continue
                    self._hooks.pop(len(self.commands), int)()
                    self.round_trips += not held
                    self.commands.append(command)
                    last = self._is_last(command)
                    applies = last and self._faults and self._faults[0].applies_to(command)
                    fault = self._faults.popleft() if applies else Fault()
                    server.sendall(given := fault.request(request))
                    if given != request or not (reply := fault.reply(self.translate(frame(replies)))):
                        return
                    held.append(reply)
                    if last:
                        client.sendall(b"".join(held))
                        held.clear()

    def _is_last(self, command: list[bytes]) -> bool:
        """Returns whether the command ends a batch, so that the delayed replies are delivered."""
        if not self._batches:
            return True
        self._batches[0] -= command[0] in {b"EVAL", b"EVALSHA"}
        return self._batches[0] == 0 and self._batches.popleft() == 0


def frame(stream: BinaryIO) -> bytes:
    """Reads the bytes of one request or reply, in RESP2 or RESP3; raises EOFError at the end."""
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    kind, rest = line[:1], line[1:]
    if kind in b"$=!" and int(rest) >= 0:
        return line + stream.read(int(rest) + 2)
    if kind in b"*~%":
        return line + b"".join(frame(stream) for _ in range(int(rest) * (2 if kind == b"%" else 1)))
    return line


def words(request: bytes) -> list[bytes]:
    """Returns the words of a command."""
    stream = io.BytesIO(request)
    count = int(stream.readline()[1:])
    return [stream.read(int(stream.readline()[1:]) + 2)[:-2] for _ in range(count)]
