"""The ids of step runs."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import crc32


def step_run_id(prefix: str, run_id: str, step: str) -> str:
    """Returns the id of a step run: opaque, URL-safe, and bound to the store's prefix by a checksum."""
    run = run_id.encode()
    body = len(run).to_bytes(2) + run + step.encode()
    return urlsafe_b64encode(crc32(prefix.encode() + b"\0" + body).to_bytes(4) + body).rstrip(b"=").decode()


def parse_step_run_id(prefix: str, id: str) -> tuple[str, str]:
    """Returns the run and the step of an id.

    Raises:
        ValueError: it is not an id that `step_run_id` returned for this prefix.
    """
    data = urlsafe_b64decode(id.encode("ascii") + b"=" * (-len(id) % 4))
    end = 6 + int.from_bytes(data[4:6])
    run_id, step = data[6:end].decode(), data[end:].decode()
    if step_run_id(prefix, run_id, step) != id:
        raise ValueError(id)
    return run_id, step
