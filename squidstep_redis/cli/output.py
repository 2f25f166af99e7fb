"""Prints results, errors and questions."""

from __future__ import annotations

import json
import sys
from typing import Any, Final, Literal, NoReturn

import click
from rich.console import Console, RenderableType
from rich.table import Table

from squidstep_redis.escaping import escaped

_NO_FOLDING: Final = 10_000  # columns


def print_text(*renderables: RenderableType) -> None:
    """Prints for people: colored and folded on a terminal; plain, one row per line, in a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _NO_FOLDING
    with console.capture() as printed:
        console.print(*renderables, sep="\n")
    for line in printed.get().splitlines():
        sys.stdout.write(f"{line.rstrip()}\n")


def print_json(value: Any) -> None:
    """Prints for programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_line(text: str) -> None:
    """Prints one line of untrusted text."""
    sys.stdout.write(f"{escaped(text)}\n")


def terminal_width() -> int:
    """Returns the terminal's width in columns, or 100 in a pipe."""
    console = Console()
    return console.width if console.is_terminal else 100


def new_table(columns: dict[str, Literal["fold", "fill", "fixed", "number"]]) -> Table:
    """Makes an empty table.

    Args:
        columns: Each column's heading, and its layout. `fold` wraps long text. `fill` also wraps it, and uses the
            remaining width. `fixed` and `number` stay on one line; numbers are aligned to the right.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, layout in columns.items():
        folds = layout in ("fold", "fill")
        table.add_column(
            heading,
            justify="right" if layout == "number" else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "ellipsis",
            ratio=1 if layout == "fill" else None,
        )
    return table


def fail(problem: str, code: int) -> NoReturn:
    """Exits the program with a message on stderr.

    Args:
        problem: What failed, and why; printed as one line.
        code: The exit code.
    """
    sys.stderr.write(f"squidstep: {escaped(problem)}\n")
    sys.exit(code)


def confirm(action: str, *, yes: bool, dry_run: bool) -> bool:
    """Returns whether to continue. Exits the program with code 1 if the user declines.

    Args:
        action: What is about to happen, such as `delete order-1`.
        yes: Skip the question, and return True.
        dry_run: Only print the action, and return False.
    """
    action = escaped(action)
    if dry_run:
        sys.stdout.write(f"would {action}\n")
        return False
    if not yes and not click.confirm(f"{action[0].upper()}{action[1:]}?", err=True):
        sys.exit(1)
    return True
