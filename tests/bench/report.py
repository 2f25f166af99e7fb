"""Writes results: as a table, as Markdown, and as the README's section about performance."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.databases import POSTGRES_VERSION, SERVERS
from bench.measure import Result
from support.servers import find_binary

Results = Mapping[str, tuple[str, list[Result]]]  # by row: its description, and its results

_PACKAGES = (
    *("squidstep-redis", "redis", "hiredis", "msgpack", "uvloop"),
    *("aws-lambda-powertools", "psycopg", "dbos"),
)
_COLUMNS = "{:<86} {:>8}  {:>26}  {:<8}"
_VERDICTS = ("met", "MISSED", "missing", "FAILED")
_HEADING = """# Benchmark results

Written by `python tests/bench --markdown`. Each figure is a median, with the range of the middle half of the values.
The yardstick is a script with a single `HSET`, called through redis-py with the same kind of client. Ratios are of
rates, measured in alternating turns.

"""
_SECTION = """## Performance

| beginning and completing a step, compared with | relative rate (above 1: faster) | in batches of 100 |
|---|---|---|
{rows}
Client and server run on one machine. Over a network, the round trip dominates the time of a single call.
DBOS is compared with `advance_step`. {memory}
`tests/bench/RESULTS.md` has the full table, its budgets, and which of them are missed.
"""


def machine() -> dict[str, str]:
    """Describes the machine, the packages and the servers."""
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "load": f"{load_average()} (load average at the start)",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "servers": ", ".join(_server_versions()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def load_average() -> str:
    """The load average of the last minute, five minutes and quarter of an hour."""
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _server_versions() -> Iterator[str]:
    for name in SERVERS:
        try:
            words = subprocess.run([find_binary(name), "--version"], capture_output=True, text=True, check=True).stdout
            yield f"{words.split()[0]} {words.partition('v=')[2].split()[0]}"
        except LookupError:
            yield f"{name} missing"
    found = shutil.which("postgres", path=f"/usr/lib/postgresql/{POSTGRES_VERSION}/bin:{os.environ.get('PATH', '')}")
    if found is None:
        yield "PostgreSQL missing"
    else:
        words = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
        yield f"PostgreSQL {words.split()[2]}"


def title_line() -> str:
    """The first line of the table."""
    return _COLUMNS.format("what", "budget", "measured (middle half)", "").rstrip()


def line(result: Result) -> str:
    """A line of the table."""
    return _COLUMNS.format(result.what, str(result.budget or ""), result.measured, result.verdict).rstrip()


def verdicts(results: Results) -> str:
    """Counts the budgets that are met, and the others."""
    found = [result.verdict for result in _all(results)]
    return ", ".join(f"{found.count(word)} {word.lower()}" for word in _VERDICTS)


def plot_note(about: Mapping[str, str]) -> str:
    """The line below the plot."""
    machine_name = about["machine"].partition(f", {platform.system()}")[0]
    return f"200 B payloads, medians of interleaved turns. {machine_name}, {about['when'][:10]}"


def markdown(about: Mapping[str, str], results: Results) -> str:
    """The whole table as a Markdown page, with a section for each row."""
    return "".join(_markdown(about, results))


def _markdown(about: Mapping[str, str], results: Results) -> Iterator[str]:
    yield _HEADING
    yield from (f"- {name}: {value}\n" for name, value in about.items())
    yield f"- budgets: {verdicts(results)}\n"
    for row, (description, found) in results.items():
        yield f"\n## {row}\n\n{description}\n\n| what | measured | budget | |\n|---|---|---|---|\n"
        for result in found:
            verdict = f"**{result.verdict}**" if result.verdict in ("MISSED", "FAILED") else result.verdict
            what = f"{result.what}{f'<br>{result.note}' if result.note else ''}"
            yield f"| {what} | {result.measured} | {result.budget or ''} | {verdict} |\n"


def with_performance(readme: str, results: Results) -> str:
    """Returns the README with its performance section replaced by the results."""
    cells: dict[str, dict[str, str]] = {}
    memory: list[str] = []
    for result in _all(results):
        if result.summary is None or result.median is None:
            continue
        label, column = result.summary
        if column == "bytes":
            memory.append(f"{result.median:.0f} bytes in addition to payloads of {label} bytes")
        else:
            cells.setdefault(label, {})[column] = _times(result.median)
    rows = "".join(f"| {label} | {row.get('single', '-')} | {row.get('batch', '')} |\n" for label, row in cells.items())
    sentence = f"A completed step uses {', and '.join(memory)}." if memory else ""
    section = _SECTION.format(rows=rows, memory=sentence)
    old = r"^## Performance\n.*?(?=^## |\Z)"
    changed, count = re.subn(old, lambda _: f"{section}\n", readme, flags=re.MULTILINE | re.DOTALL)
    assert count == 1, "the README has no section about performance"
    return changed


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _all(results: Results) -> Iterable[Result]:
    return (result for _, found in results.values() for result in found)
