"""A fixed address in front of servers that change: new connections lead to the current one, old ones stay."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self


class Address:
    """Passes bytes on, in both directions.

    Attributes:
        port: the port of the address, on loopback.
        target: the port of the server to which new connections lead.
        pause: seconds between the single bytes of replies; 0: replies are passed on at once.
        reading_pause: seconds between pieces of 64 KiB that are read from clients.
        accepted: how many connections were accepted.
    """

    def __init__(self, target: int, *, is_open: bool = True) -> None:
        """Binds a port. Unless `is_open`, connections are refused until `open` is called."""
        self.target = target
        self.pause = 0.0
        self.reading_pause = 0.0
        self.accepted = 0
        self._readable = threading.Event()
        self._readable.set()
        self._sockets: list[socket.socket] = []
        self._is_open = is_open
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        if self._is_open:
            self.open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.resume()
        self._close(self._listener)
        self.disconnect()

    def open(self) -> None:
        """Accepts connections from now on."""
        self._listener.listen(200)
        self._start(self._accept)

    def disconnect(self) -> None:
        """Closes all connections."""
        while self._sockets:
            self._close(self._sockets.pop())

    def stall(self) -> None:
        """Stops passing on what clients send."""
        self._readable.clear()

    def resume(self) -> None:
        """Passes on again what clients send."""
        self._readable.set()

    @staticmethod
    def _close(each: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is already closed
            each.shutdown(socket.SHUT_RDWR)
        each.close()

    @staticmethod
    def _start(target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                self._start(self._requests, client, server)
                self._start(self._replies, server, client)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while self._readable.wait() and (data := client.recv(65_536)):
                self._readable.wait()
                time.sleep(self.reading_pause)
                server.sendall(data)
        self._close(server)

    def _replies(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65_536):
                if not self.pause:
                    client.sendall(data)
                    continue
                for byte in data:
                    client.sendall(bytes([byte]))
                    time.sleep(self.pause)
        self._close(client)
