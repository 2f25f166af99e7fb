"""Polling for a reply: only while it pays off, and only where it takes no time from others."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest
from support.backends import Bench

from squidstep_redis.transport import link
from squidstep_redis.transport import spin as module
from squidstep_redis.transport.spin import Spin, callers, spare_cpus


@pytest.fixture
def spin(monkeypatch: pytest.MonkeyPatch) -> Spin:
    monkeypatch.setattr(Spin, "_is_possible", True)
    return Spin()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def polls(spin: Spin, calls: int, *, in_time: bool) -> int:
    """Returns how many of these calls polled."""
    count = 0
    for _ in range(calls):
        if (begun := spin.begin()) is not None:
            spin.end(begun, in_time=in_time)
            count += 1
    return count


class TestPolicy:
    def test_calls_poll_while_replies_arrive_in_time(self, spin: Spin, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_time_lost", lambda: 0.0)
        assert polls(spin, 100, in_time=True) == 100

    def test_few_calls_poll_if_replies_arrive_late(self, spin: Spin) -> None:
        assert polls(spin, 510, in_time=False) == 5
        assert polls(spin, 10 * 256, in_time=False) == 10

    def test_few_calls_poll_if_the_thread_waits_for_a_cpu(self, spin: Spin, monkeypatch: pytest.MonkeyPatch) -> None:
        lost = iter(number / 1_000 for number in range(100))
        monkeypatch.setattr(module, "_time_lost", lambda: next(lost))
        assert polls(spin, 510, in_time=True) == 5

    def test_calls_poll_again_when_polling_pays_off_again(self, spin: Spin, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_time_lost", lambda: 0.0)
        polls(spin, 510, in_time=False)
        polls(spin, 510, in_time=True)
        assert polls(spin, 100, in_time=True) == 100

    def test_no_call_polls_while_another_thread_waits_for_a_reply(
        self, spin: Spin, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "callers", {1, 2})
        assert spin.begin() is None

    def test_no_call_polls_on_a_single_cpu(self, spin: Spin, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        assert spare_cpus() == 0
        monkeypatch.setattr(Spin, "_is_possible", spare_cpus() > 0)
        assert spin.begin() is None


class TestSocket:
    def test_socket_is_polled_for_a_moment(self, spin: Spin, pair: tuple[socket.socket, socket.socket]) -> None:
        began = time.monotonic()
        spin.wait(pair[0])
        assert time.monotonic() - began >= module.SECONDS
        assert spin.begin() is None  # the next call does not poll

    def test_readable_bytes_are_left_in_the_socket(self, spin: Spin, pair: tuple[socket.socket, socket.socket]) -> None:
        pair[1].send(b"reply")
        spin.wait(pair[0])
        assert pair[0].recv(100) == b"reply"

    def test_closed_socket_is_not_polled(self, spin: Spin, pair: tuple[socket.socket, socket.socket]) -> None:
        pair[0].close()
        spin.wait(pair[0])

    def test_encrypted_socket_is_not_polled(self, spin: Spin, pair: tuple[socket.socket, socket.socket]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        with context.wrap_socket(pair[0].dup(), do_handshake_on_connect=False) as encrypted:
            spin.wait(encrypted)
        assert spin.begin() is not None


class TestCalls:
    @pytest.mark.servers("valkey", "cluster")
    @pytest.mark.parametrize("bench", ["blocking"], indirect=True)
    def test_no_caller_is_left(self, bench: Bench, spins: list[Spin]) -> None:
        store = bench.store()
        for number in range(20):
            store.begin_step("run", f"step-{number}", {})
        assert spins
        assert threading.get_ident() not in callers

    @pytest.mark.servers("valkey")
    def test_call_sleeps_if_its_reply_is_late(
        self, bench: Bench, spins: list[Spin], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        yields = 0

        def let_others_run() -> None:
            nonlocal yields
            yields += 1

        for each in (module, link):
            monkeypatch.setattr(each, "let_others_run", let_others_run)
        store = bench.store(own_connections=True)
        store.begin_step("run", "first", {})
        yields = 0
        for spin in spins:
            spin._misses = spin._to_skip = 0
        bench.backend.raw.client_pause(100, all=True)

        assert store.begin_step("run", "second", {}).decision == "execute"

        assert yields < 1_000
        assert [spin._misses for spin in spins if spin._misses] == [2]


@pytest.fixture
def spins(monkeypatch: pytest.MonkeyPatch) -> list[Spin]:
    """All objects that decide whether to poll, in order."""
    made: list[Spin] = []
    initialize = Spin.__init__

    def register(self: Spin) -> None:
        made.append(self)
        initialize(self)

    monkeypatch.setattr(Spin, "__init__", register)
    monkeypatch.setattr(Spin, "_is_possible", True)
    return made
