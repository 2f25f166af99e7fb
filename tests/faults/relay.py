"""A network between the workers and their server that loses and delays data, at the speed of the soak.

`proxy.py` parses commands, so that a test can choose the one to disturb. The relay only moves bytes, and cuts anywhere.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Self

CHUNK: Final = 1 << 18
DELAY: Final = (0.02, 0.5)  # seconds that a late request takes: least and most


class Relay:
    """Forwards connections to a server.

    Attributes:
        server: the address to which new connections lead; existing ones stay where they are.
        port: the loopback port that clients connect to.
    """

    def __init__(self, server: tuple[str, int], dice: random.Random) -> None:
        self.server = server
        self._dice = dice
        self._replies_to_lose: deque[None] = deque()
        self._request_faults: deque[Callable[[socket.socket, socket.socket, bytes], None]] = deque()
        self._late: list[tuple[float, socket.socket, bytes]] = []
        self._other_end: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port: int = self._listener.getsockname()[1]

    def lose_replies(self, times: int) -> None:
        """Truncates each of the next replies at random, possibly to nothing, and closes its connection."""
        self._replies_to_lose.extend([None] * times)

    def lose_request(self) -> None:
        """Truncates the next request at random, possibly to nothing, and closes its connection."""
        self._request_faults.append(self._cut)

    def delay_request(self) -> None:
        """Closes the connection of the next request, and delivers the request later, perhaps after a retry of it."""
        self._request_faults.append(self._delay)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._wake.close()
        self._thread.join()
        self._listener.close()
        for each in [*self._other_end, *(server for _, server, _ in self._late)]:
            each.close()
        self._selector.close()
        self._woken.close()

    def _run(self) -> None:
        while True:
            timeout = None if not self._late else max(0, min(late[0] for late in self._late) - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._woken:
                    return
                # A connection that was closed in this loop has no handler any more.
                if key.data == self._accept or key.fileobj in self._other_end:
                    key.data(key.fileobj)
            self._deliver_late()

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(self.server)
        except OSError:  # the server is down
            client.close()
            return
        for end, other, handler in ((client, server, self._request), (server, client, self._reply)):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._other_end[end] = other
            self._selector.register(end, selectors.EVENT_READ, handler)

    def _request(self, client: socket.socket) -> None:
        server = self._other_end[client]
        data = self._receive(client)
        if data and self._request_faults:
            self._request_faults.popleft()(client, server, data)
        elif data:
            self._send(server, data)

    def _reply(self, server: socket.socket) -> None:
        client = self._other_end[server]
        data = self._receive(server)
        if data and self._replies_to_lose:
            self._replies_to_lose.popleft()
            self._cut(server, client, data)
        elif data:
            self._send(client, data)

    def _cut(self, sender: socket.socket, receiver: socket.socket, data: bytes) -> None:
        self._send(receiver, data[: self._dice.randrange(len(data))])
        self._close(sender)

    def _delay(self, client: socket.socket, server: socket.socket, data: bytes) -> None:
        self._late.append((time.monotonic() + self._dice.uniform(*DELAY), server, data))
        self._selector.unregister(server)
        del self._other_end[server]
        self._forget(client)

    def _deliver_late(self) -> None:
        now = time.monotonic()
        for late in [late for late in self._late if late[0] <= now]:
            self._late.remove(late)
            _, server, data = late
            with server, contextlib.suppress(OSError):
                server.sendall(data)
                server.shutdown(socket.SHUT_WR)
                while server.recv(CHUNK):  # closing with unread data would reset the connection and drop the request
                    pass

    def _receive(self, end: socket.socket) -> bytes:
        try:
            data = end.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            self._close(end)
        return data

    def _send(self, end: socket.socket, data: bytes) -> None:
        try:
            end.sendall(data)
        except OSError:
            self._close(end)

    def _close(self, end: socket.socket) -> None:
        if end in self._other_end:
            self._forget(self._other_end[end])
            self._forget(end)

    def _forget(self, end: socket.socket) -> None:
        if self._other_end.pop(end, None) is not None:
            self._selector.unregister(end)
        end.close()
