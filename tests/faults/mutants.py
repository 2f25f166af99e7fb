"""Bugs that are injected into a copy of the scripts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug to inject into a script: `replacement` replaces `original`."""

    file: str
    original: str
    replacement: str

    def apply(self, lua: Path) -> None:
        """Injects the bug into the scripts of a directory."""
        source = (lua / self.file).read_text("utf-8")
        assert source.count(self.original) == 1, (
            f"{self.file} has {self.original!r} {source.count(self.original)} times"
        )
        (lua / self.file).write_text(source.replace(self.original, self.replacement), "utf-8")
