"""The packers of the default codec: reused, but not the ones whose buffer a large payload has grown."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.internals import idle_packers

from squidstep_redis import MsgpackCodec

LARGE = {"data": b"x" * 1_000_000}


@pytest.fixture(autouse=True)
def no_packer_is_idle() -> Iterator[None]:
    """Each test begins without idle packers."""
    idle_packers().clear()
    yield
    idle_packers().clear()


def test_packer_of_small_payloads_is_reused() -> None:
    MsgpackCodec().encode({"amount": 1})
    (packer,) = idle_packers()

    MsgpackCodec().encode({"amount": 2})

    assert list(idle_packers()) == [packer]


def test_packer_grown_by_a_large_payload_is_dropped() -> None:
    codec = MsgpackCodec()

    assert codec.decode(codec.encode(LARGE)) == LARGE

    assert not idle_packers()


def test_packer_of_a_rejected_payload_is_dropped() -> None:
    with pytest.raises(ValueError, match="payload"):
        MsgpackCodec().encode({"half": {"packed": [1, 2, object()]}})

    assert MsgpackCodec().encode({}) == b"\x80"
