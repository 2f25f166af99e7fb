"""The Redis keys of a run, and those that span runs. lua/README.md draws the layout."""

from __future__ import annotations

import re
from binascii import crc32
from functools import lru_cache
from typing import Final, NamedTuple

from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId

BUCKETS: Final = 1024
RUNS_CACHED: Final = 1_024  # per store: usually the worker that begins a step also completes it

_GLOB: Final = re.compile(rb"[*?\[\]\\^-]")
_MEMBER: Final = re.compile(rb"([1-9]\d{0,2}):(.+)", re.DOTALL)


class RunKeys(NamedTuple):
    """The keys that the scripts of one run use, all in one hash slot."""

    steps: bytes
    done: bytes
    claims: bytes
    failed: bytes


class Run(NamedTuple):
    """A checked run id, and the keys derived from it.

    Attributes:
        text: the id.
        keys: the keys of the run and of its bucket.
        member: prefix of the members of its steps in the two indexes.
        stream: key of the stream that notifies clients of ended steps. It exists for a minute after a notification.
    """

    text: str
    keys: RunKeys
    member: bytes
    stream: bytes


class Keys:
    """The keys of one prefix."""

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._buckets = [b"%s:{%x}:" % (prefix, bucket) for bucket in range(BUCKETS)]
        self._cached_run = lru_cache(RUNS_CACHED)(self._run)

    def run(self, run_id: RunId) -> Run:
        """Returns the run of an id; raises InvalidArgumentError if the id is rejected."""
        return self._cached_run(run_id) if type(run_id) is str else self._run(run_id)

    def _run(self, run_id: RunId) -> Run:
        text, data = arguments.run_id(run_id)
        stream = self._bucket(data) + data + b":wake"
        return Run(text, self.of_run(data), member_prefix(data), stream)

    def of_run(self, run_id: bytes) -> RunKeys:
        """Returns the keys of a run, given its id in UTF-8."""
        bucket = self._bucket(run_id)
        run = bucket + run_id
        return RunKeys(run + b":steps", run + b":done", bucket + b"claims", bucket + b"failed")

    def _bucket(self, run_id: bytes) -> bytes:
        return self._buckets[crc32(run_id) % len(self._buckets)]

    def claims(self) -> list[bytes]:
        """Returns the claims index of every bucket."""
        return [bucket + b"claims" for bucket in self._buckets]

    def failed(self) -> list[bytes]:
        """Returns the index of failed steps of every bucket."""
        return [bucket + b"failed" for bucket in self._buckets]

    def runs(self) -> list[bytes]:
        """Returns the index of runs of every bucket."""
        return [bucket + b"runs" for bucket in self._buckets]

    def pattern(self, run_id_prefix: bytes) -> bytes:
        """Returns the SCAN pattern for the steps keys of the runs whose id has this prefix."""
        prefix, begins = (_GLOB.sub(rb"\\\g<0>", part) for part in (self._prefix, run_id_prefix))
        return prefix + b":{*}:" + begins + b"*:steps"

    def run_of(self, steps_key: bytes) -> bytes | None:
        """Returns the run id of a key that `pattern` matched; None if it is not the steps key of a run."""
        run_id = steps_key[len(self._prefix) :].partition(b"}:")[2].removesuffix(b":steps")
        return run_id if run_id and self.of_run(run_id).steps == steps_key else None


def member_prefix(run_id: bytes) -> bytes:
    """Returns the prefix of the index members of a run's steps. lua/lib/indexes.lua explains the form."""
    return b"%d:%b" % (len(run_id), run_id)


def parse_member(member: bytes) -> tuple[bytes, bytes] | None:
    """Returns the run and the step that an index member names; None if this library would not write the member."""
    match = _MEMBER.fullmatch(member)
    if match is None:
        return None
    length, names = int(match[1]), match[2]
    run, step = names[:length], names[length:]
    if not all(_is_identifier(name) for name in (run, step)):
        return None
    return run, step


def run_of_member(member: bytes) -> tuple[bytes, bytes]:
    """Returns the run, and its labels as they are stored, that a member of the index of runs names.

    `list_runs` returns only members that squidstep_redis would write.
    """
    length, _, rest = member.partition(b":")
    return rest[: int(length)], rest[int(length) + 1 :]


def _is_identifier(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return 0 < len(name) <= arguments.MAX_IDENTIFIER_BYTES
