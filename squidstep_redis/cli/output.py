"""Prints results, errors and questions."""

from __future__ import annotations

import codecs
import json
import sys
from typing import Any, Final, Literal, NoReturn

import click
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from squidstep_redis.escaping import escaped, json_line

_NO_FOLDING: Final = 10_000  # columns

Layout = Literal["fold", "fill", "fixed", "number"]


def new_console(*, stderr: bool = False) -> Console:
    """Makes a console that is a terminal only if the stream is one, also if variables such as FORCE_COLOR are set.

    To rich, a terminal is more than colors: it folds lines, drops columns and draws live displays.
    """
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, force_terminal=stream.isatty())


def print_text(*renderables: RenderableType) -> None:
    """Prints for people: colored and folded on a terminal; plain, one row per line, in a pipe."""
    console = new_console()
    if not console.is_terminal:
        console.width = _NO_FOLDING
    for renderable in renderables:
        lines = None if console.is_terminal else _plain_lines(renderable)
        if lines is None:
            with console.capture() as printed:
                console.print(renderable)
            lines = printed.get().splitlines()
        for line in lines:
            sys.stdout.write(f"{line.rstrip()}\n")


def _plain_lines(renderable: RenderableType) -> list[str] | None:
    """Returns text and simple tables without any folding: rich folds lines that are wider than the console.

    Returns:
        None for anything else.
    """
    if isinstance(renderable, Text):
        return renderable.plain.split("\n")
    if isinstance(renderable, Padding) and isinstance(renderable.renderable, Text):
        return [" " * renderable.left + line for line in renderable.renderable.plain.split("\n")]
    if not isinstance(renderable, Table):
        return None
    headings = [column.header for column in renderable.columns] if renderable.show_header else []
    columns = [list(column.cells) for column in renderable.columns]
    rows = [headings, *zip(*columns, strict=True)] if headings else list(zip(*columns, strict=True))
    texts = [[cell.plain if isinstance(cell, Text) else str(cell) for cell in row] for row in rows]
    if any("\n" in text for row in texts for text in row):
        return None
    widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(map(_aligned, row, widths, renderable.columns)) for row in texts]


def _aligned(text: str, width: int, column: Column) -> str:
    padding = " " * (width - cell_len(text))
    return padding + text if column.justify == "right" else text + padding


def print_json(value: Any) -> None:
    """Prints for programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_json_line(value: Any) -> None:
    """Prints a value as one line of JSON: in UTF-8, or where the output has another encoding, in ASCII."""
    if codecs.lookup(sys.stdout.encoding).name == "utf-8":
        sys.stdout.write(f"{json_line(value)}\n")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")


def print_line(text: str) -> None:
    """Prints one line of untrusted text."""
    sys.stdout.write(f"{escaped(text)}\n")


def terminal_width() -> int | None:
    """Returns the terminal's width in columns; None in a pipe, where nothing is folded or cut."""
    console = new_console()
    return console.width if console.is_terminal else None


def new_table(columns: dict[str, Layout]) -> Table:
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
