"""Index members that this library did not write: a listing drops them, and they hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun

from squidstep_redis import CorruptRunError, Level, StepRunStore
from squidstep_redis.protocol.keys import BUCKETS, member_prefix, parse_member

FOREIGN = {
    "empty": b"",
    "no length": b"order-7 pay",
    "not UTF-8": b"\xff\xfe",
    "a number alone": b"12",
    "no number before the separator": b":pay",
    "a negative number": b"-3:runpay",
    "a signed number": b"+3:runpay",
    "a space before the number": b" 3:runpay",
    "a leading zero": b"03:runpay",
    "grouped digits": b"0_3:runpay",
    "a superscript digit": "³:runpay".encode(),
    "a number of 5,000 digits": b"9" * 5_000 + b":pay",
    "an empty run": b"0:pay",
    "a length beyond the end": b"7:runpay",
    "no step": b"6:runpay",
    "a run that is not UTF-8": b"1:\xffpay",
    "a step that is not UTF-8": b"3:run\xff",
    "a length that splits a character": b"2:r\xc3\xa9pay",
    "a run that is too long": b"513:" + b"r" * 513 + b"pay",
    "a step that is too long": b"3:run" + b"s" * 513,
}
OWN = b"3:runpay"

# By reader: the position of its index among the keys of a run, and where entries come before those of the test.
READERS: dict[str, tuple[int, Callable[[float], float]]] = {
    "lapsed_claims": (2, lambda _now: 1),
    "live_claims": (2, lambda now: 1_000 * now + 20_000),
    "failed_steps": (3, lambda _now: 9e12),
}
every_reader = pytest.mark.parametrize("reader", READERS)
# fakeredis takes a second for a listing: there, one test lists and counts.


def prepare(bench: Bench, store: StepRunStore, reader: str) -> None:
    """Makes the step that the reader finds."""
    claim = begun(store.begin_step("run", "pay", {}, lease=0.01 if reader == "lapsed_claims" else 60))
    if reader == "lapsed_claims":
        bench.lapse(claim)
    elif reader == "failed_steps":
        store.fail_step(claim, {})


def add(bench: Bench, reader: str, members: list[bytes], run_id: str = "run") -> bytes:
    """Adds members to the index of a run's bucket, ahead of all others; returns its key."""
    index, score = READERS[reader]
    key = bench.keys(run_id)[index]
    bench.backend.raw.zadd(key, dict.fromkeys(members, score(bench.backend.now())))
    return key


def found(store: StepRunStore, reader: str, **options: Any) -> list[tuple[str, str]]:
    return [(each.run_id, each.step) for each in getattr(store, reader)(**options)]


def members(bench: Bench, key: bytes) -> list[bytes]:
    return bench.backend.raw.zrange(key, 0, -1)


@pytest.mark.parametrize("member", FOREIGN.values(), ids=FOREIGN)
def test_foreign_member_names_no_step(member: bytes) -> None:
    assert parse_member(member) is None


@pytest.mark.parametrize(("run", "step"), [("run", "pay"), ("1:x", ":"), ("é" * 256, "😀" * 128), ("\0", "\n")])
def test_own_member_names_its_run_and_step(run: str, step: str) -> None:
    names = run.encode(), step.encode()
    assert parse_member(member_prefix(names[0]) + names[1]) == names


@pytest.mark.slow
class TestForeignMembers:
    @every_reader
    def test_listing_finds_the_others_and_drops_them(self, bench: Bench, store: StepRunStore, reader: str) -> None:
        prepare(bench, store, reader)
        key = add(bench, reader, list(FOREIGN.values()))

        assert found(store, reader) == [("run", "pay")]

        assert members(bench, key) == [OWN]

    @pytest.mark.servers("valkey", "redis-7", "redis-6")  # a page is read from a single server
    @every_reader
    def test_more_of_them_than_a_page_hide_nothing(self, bench: Bench, store: StepRunStore, reader: str) -> None:
        prepare(bench, store, reader)
        key = add(bench, reader, [b"foreign-%d" % number for number in range(1_500)])

        assert found(store, reader) == [("run", "pay")]

        assert members(bench, key) == [OWN]

    @every_reader
    def test_member_in_another_bucket_is_foreign_there(self, bench: Bench, store: StepRunStore, reader: str) -> None:
        prepare(bench, store, reader)
        own = bench.keys("run")[READERS[reader][0]]
        other = add(bench, reader, [OWN], run_id="another")
        assert other != own

        assert found(store, reader) == [("run", "pay")]

        assert (members(bench, own), members(bench, other)) == ([OWN], [])

    @pytest.mark.parametrize("bench", ["blocking"], indirect=True)
    def test_they_are_counted_until_a_listing_drops_them(self, bench: Bench, store: StepRunStore) -> None:
        prepare(bench, store, "live_claims")
        add(bench, "live_claims", [b"garbage"])
        add(bench, "lapsed_claims", [b"garbage of another kind"])
        assert store.count_claims() == (2, 1)

        store.live_claims()
        store.lapsed_claims()

        assert store.count_claims() == (1, 0)

    def test_they_disturb_neither_purge_nor_delete_run(self, bench: Bench, store: StepRunStore) -> None:
        for run_id in ("run", "purged"):
            store.fail_step(begun(store.begin_step(run_id, "pay", {})), {})
            for reader in READERS:
                add(bench, reader, list(FOREIGN.values()), run_id)
        bench.lapse(begun(store.begin_step("timer", "pay", {}, lease=0.005)))  # the server's clock moves on

        assert store.delete_run("run") is True
        assert [summary.run_id for summary in store.purge(0.001)] == ["purged"]

        assert store.failed_steps() == []

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_they_disturb_no_self_test_of_the_doctor(self, bench: Bench, store: StepRunStore) -> None:
        for bucket in range(BUCKETS):
            for index in ("claims", "failed"):
                bench.backend.raw.zadd(f"{bench.prefix}:{{{bucket:x}}}:{index}", {b"garbage": 1, b"\xff": 9e12})

        levels = {finding.check: finding.level for finding in store.doctor().findings}

        assert levels["self-test"] is Level.OK


# Each reader, and each type: the script sees the same error of the server for all of them.
OTHER_TYPES: list[tuple[str, Callable[[Any, bytes], object]]] = [
    ("lapsed_claims", lambda raw, key: raw.set(key, "x")),
    ("live_claims", lambda raw, key: raw.hset(key, "field", "x")),
    ("failed_steps", lambda raw, key: raw.rpush(key, "x")),
    ("count_claims", lambda raw, key: raw.sadd(key, "x")),
    ("count_claims", lambda raw, key: raw.xadd(key, {"field": "x"})),
]


@pytest.mark.parametrize(
    ("reader", "write"), OTHER_TYPES, ids=["lapsed-string", "live-hash", "failed-list", "count-set", "count-stream"]
)
def test_index_key_of_another_type_is_named_and_kept(
    bench: Bench, store: StepRunStore, reader: str, write: Callable[[Any, bytes], object]
) -> None:
    key = bench.keys("run")[3 if reader == "failed_steps" else 2]
    write(bench.backend.raw, key)
    kind = bench.backend.raw.type(key)

    with pytest.raises(CorruptRunError) as caught:
        getattr(store, reader)()

    assert caught.value.key == key.decode()
    assert bench.backend.raw.type(key) == kind
