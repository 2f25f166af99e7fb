"""`CompressedCodec`: payloads come back equal, and no stored value decompresses without bound."""

from __future__ import annotations

import sys
import tracemalloc
import zlib
from typing import Any, Literal

import pytest
from hypothesis import example, given
from support.backends import Bench, offline_store
from support.payloads import EDGES, assert_same, payloads, rejection, returned
from support.records import begun, stored

from squidstep_redis import InvalidArgumentError, MsgpackCodec, PayloadError, UndecodablePayloadError
from squidstep_redis.codecs import CompressedCodec, EncryptedCodec

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1024 * 1024
ALGORITHMS: tuple[Literal["zlib"], Literal["zstd"]] = ("zlib", "zstd")
LONG = {"text": "abc" * 10_000}

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


class Marked:
    """A codec whose output begins with the mark of compressed payloads."""

    def encode(self, payload: dict[str, Any]) -> bytes:
        return b"\xc1z" + MsgpackCodec().encode(payload)

    def decode(self, data: bytes) -> dict[str, Any]:
        assert data[:2] == b"\xc1z"
        return MsgpackCodec().decode(data[2:])


@algorithms
class TestRoundTrip:
    @given(payload=payloads)
    @example(payload=EDGES)
    def test_payload_comes_back_equal(self, algorithm: Any, payload: dict[str, Any]) -> None:
        for inner, threshold in ((None, 1_024), (MsgpackCodec(), 0), (Marked(), 1_024), (Marked(), 0)):
            codec = CompressedCodec(inner, algorithm=algorithm, threshold=threshold)
            assert_same(codec.decode(codec.encode(payload)), returned(payload))

    def test_long_payload_is_stored_compressed(self, bench: Bench, algorithm: Any) -> None:
        store = bench.store(codec=CompressedCodec(algorithm=algorithm))
        store.complete_step(begun(store.begin_step("run", "pay", {})), LONG)

        assert stored(store).output == LONG
        assert len(bench.field("run", "opay") or b"") < 1_000

    def test_short_or_incompressible_payload_is_stored_unchanged(self, algorithm: Any) -> None:
        short, noise = {"text": "abc" * 300}, {"noise": zlib.compress(bytes(range(256)) * 8)[:200]}
        assert CompressedCodec(algorithm=algorithm).encode(short) == MsgpackCodec().encode(short)
        assert CompressedCodec(algorithm=algorithm, threshold=0).encode(noise) == MsgpackCodec().encode(noise)

    def test_other_settings_are_read(self, algorithm: Any) -> None:
        data = CompressedCodec(algorithm=algorithm, level=1, threshold=0).encode(LONG)
        assert CompressedCodec().decode(data) == CompressedCodec(algorithm="zstd", level=9).decode(data) == LONG

    def test_payloads_of_the_default_codec_are_read(self, bench: Bench, algorithm: Any) -> None:
        begun(bench.store().begin_step("run", "pay", LONG))
        assert stored(bench.store(codec=CompressedCodec(algorithm=algorithm))).input == LONG


class TestBound:
    @pytest.mark.parametrize("excess", [0, 1])
    @algorithms
    def test_limit_is_exact_in_both_directions(self, algorithm: Any, excess: int) -> None:
        payload = {"data": bytes(5_000)}
        size = len(MsgpackCodec().encode(payload))
        writer = CompressedCodec(algorithm=algorithm, max_decompressed_bytes=size)
        codec = CompressedCodec(algorithm=algorithm, max_decompressed_bytes=size - excess)
        if not excess:
            assert codec.decode(codec.encode(payload)) == payload
            return
        with pytest.raises(PayloadError, match="over max_decompressed_bytes"):
            codec.encode(payload)
        with pytest.raises(PayloadError, match="over max_decompressed_bytes"):
            codec.decode(writer.encode(payload))

    def test_oversized_payload_is_rejected_before_sending(self) -> None:
        with offline_store(codec=CompressedCodec(max_decompressed_bytes=1_000)) as store:
            assert "over max_decompressed_bytes of 1,000" in str(rejection(store, "steps['pay']", LONG))

    @pytest.mark.slow
    @pytest.mark.servers("fakeredis")
    @pytest.mark.parametrize("bench", ["blocking"], indirect=True)  # it takes seconds, and no server sees what it is
    @algorithms
    def test_bomb_is_not_expanded(self, bench: Bench, algorithm: str) -> None:
        bomb = zlib.compress(bytes(500 * MIB), 9) if algorithm == "zlib" else zstd.compress(bytes(500 * MIB))
        begun(bench.store().begin_step("run", "pay", {}))
        bench.backend.raw.hset(bench.keys("run")[0], "ipay", {"zlib": b"\xc1z", "zstd": b"\xc1s"}[algorithm] + bomb)
        step_run = stored(bench.store(codec=CompressedCodec(max_decompressed_bytes=MIB)))

        tracemalloc.start()
        try:
            with pytest.raises(UndecodablePayloadError, match="cannot decode the stored input: it is over max_decomp"):
                _ = step_run.input
            assert tracemalloc.get_traced_memory()[1] < 20 * MIB
        finally:
            tracemalloc.stop()

    def test_zstd_window_beyond_the_limit_is_rejected(self) -> None:
        options = {zstd.CompressionParameter.window_log: 27}
        compressor = zstd.ZstdCompressor(options=options)
        data = compressor.compress(bytes(1_000)) + compressor.flush()  # of unknown size, so with a window of 128 MiB

        with pytest.raises(PayloadError, match="cannot be decompressed"):
            CompressedCodec(max_decompressed_bytes=MIB).decode(b"\xc1s" + data)


class TestDamaged:
    @algorithms
    def test_truncated_or_extended_payload_is_undecodable(self, algorithm: Any) -> None:
        codec = CompressedCodec(algorithm=algorithm)
        data = codec.encode(LONG)
        for damaged in (data[:-1], data[:10], data + b"x", data[:2], data[:1], b"\xc1?", data[:2] + b"\0" * 50):
            with pytest.raises(PayloadError, match="CompressedCodec|decompressed"):
                codec.decode(damaged)


class TestArguments:
    @pytest.mark.parametrize(
        ("settings", "argument"),
        [
            ({"algorithm": "lz4"}, "algorithm"),
            ({"level": 10}, "level"),
            ({"level": True}, "level"),
            ({"algorithm": "zstd", "level": 23}, "level"),
            ({"threshold": -1}, "threshold"),
            ({"max_decompressed_bytes": 0}, "max_decompressed_bytes"),
            ({"codec": object()}, "codec"),
            ({"codec": MsgpackCodec}, "codec"),
            ({"codec": EncryptedCodec({"k": bytes(16)}, current="k")}, "codec"),
        ],
    )
    def test_invalid_argument_is_rejected(self, settings: dict[str, Any], argument: str) -> None:
        with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
            CompressedCodec(**settings)

    def test_repr_shows_the_settings(self) -> None:
        assert repr(CompressedCodec()) == "CompressedCodec(MsgpackCodec(), algorithm='zlib', level=6)"
