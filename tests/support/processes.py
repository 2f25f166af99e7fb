"""What /proc says about processes."""

from __future__ import annotations

from pathlib import Path


def _stat(pid: int) -> list[str]:
    """Returns the state of a process, its parent, its group and its session; empty if the process is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    fields = stat.rpartition(")")[2].split()[:4]
    return [] if fields[0] == "Z" else fields


def session_of(pid: int) -> int | None:
    """Returns the session of a process, or None if the process is dead."""
    fields = _stat(pid)
    return int(fields[3]) if fields else None


def is_alive(pid: int) -> bool:
    """Returns whether the process is alive; a zombie is not."""
    return bool(_stat(pid))
