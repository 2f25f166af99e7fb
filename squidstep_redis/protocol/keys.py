"""The Redis keys of a run, and those that span runs (lua/README.md draws the layout)."""

from __future__ import annotations

import re
from binascii import crc32
from typing import Final, NamedTuple

BUCKETS: Final = 1024

_GLOB: Final = re.compile(rb"[*?\[\]\\^-]")


class RunKeys(NamedTuple):
    """The keys that the scripts of one run touch, all in one hash slot."""

    steps: bytes
    done: bytes
    claims: bytes
    failed: bytes


class Keys:
    """The keys of one prefix."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._buckets = [b"%s:{%x}:" % (prefix, bucket) for bucket in range(BUCKETS)]

    def run(self, run_id: bytes) -> RunKeys:
        """The keys of a run."""
        bucket = self._buckets[crc32(run_id) % BUCKETS]
        run = bucket + run_id
        return RunKeys(run + b":steps", run + b":done", bucket + b"claims", bucket + b"failed")

    def wake(self, run_id: bytes) -> bytes:
        """The stream that tells those who wait for a step of the run; it is there for a minute after it told."""
        return self._buckets[crc32(run_id) % BUCKETS] + run_id + b":wake"

    def claims(self) -> list[bytes]:
        """The claims index of every bucket."""
        return [bucket + b"claims" for bucket in self._buckets]

    def failed(self) -> list[bytes]:
        """The index of failed steps of every bucket."""
        return [bucket + b"failed" for bucket in self._buckets]

    def pattern(self, run_id_prefix: bytes) -> bytes:
        """What SCAN is to match for the steps keys of runs whose id begins so."""
        prefix, begins = (_GLOB.sub(rb"\\\g<0>", part) for part in (self._prefix, run_id_prefix))
        return prefix + b":{*}:" + begins + b"*:steps"

    def run_of(self, steps_key: bytes) -> bytes | None:
        """The run whose steps lie under a key that `pattern` matches; None: it is no such key after all."""
        run_id = steps_key[len(self._prefix) :].partition(b"}:")[2].removesuffix(b":steps")
        return run_id if run_id and self.run(run_id).steps == steps_key else None


def member_prefix(run_id: bytes) -> bytes:
    """What the members of all steps of a run begin with, in an index (lua/lib/indexes.lua says why)."""
    return b"%d:%b" % (len(run_id), run_id)


def parse_member(member: bytes) -> tuple[bytes, bytes]:
    """Takes a member of an index back to its run and step."""
    length, _, names = member.partition(b":")
    return names[: int(length)], names[int(length) :]
