"""Compares squidstep_redis with the bare protocol and with its alternatives, and measures it at scale. Prints a table.

    python tests/bench [--quick] [--only ROW] [--json FILE] [--svg FILE] [--markdown FILE]

It starts and stops the servers that it needs. Rows whose packages or servers are not installed are shown as missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `bench` is a package in tests/, and uses tests/support

from bench import rows, scale
from bench.databases import POSTGRES_VERSION
from bench.measure import FULL, QUICK, Pace, Result
from bench.plot import plot
from support.servers import find_binary

ROWS: dict[str, rows.Row] = {
    "wire": rows.against_the_wire,
    "asyncio": rows.on_asyncio,
    "payloads": rows.payload_sizes,
    "successors": rows.successors,
    "chains": rows.chains,
    "events": rows.events,
    "reads": rows.reads,
    "import": rows.import_time,
    "peers": rows.against_peers,
    "databases": rows.against_databases,
    "long-run": scale.long_run,
    "many-steps": scale.many_steps,
    "processes": scale.many_processes,
    "cluster": scale.cluster,
    "indexes": scale.indexes,
    "lists": scale.lists,
}
PACKAGES = ("squidstep-redis", "redis", "hiredis", "msgpack", "aws-lambda-powertools", "psycopg", "dbos")
COLUMNS = "{:<72} {:>9}  {:>24}  {:<8}"
HEADING = """# Benchmark results

Written by `python tests/bench --markdown`. Each figure is a median, with the range of the middle half of the values.

"""


def main() -> int:
    """Returns the exit status: 1 if a row raised an exception, else 0, even if a budget is missed."""
    args = _arguments()
    pace = QUICK if args.quick else FULL
    about = machine()
    for name, value in about.items():
        print(f"{name:<10} {value}")
    print(f"\n{COLUMNS.format('what', 'budget', 'measured (middle half)', '')}".rstrip())
    results: list[Result] = []
    start = time.monotonic()
    for result in measured(args.only or list(ROWS), pace):
        results.append(result)
        budget = str(result.budget or "")
        print(COLUMNS.format(result.what, budget, result.measured, result.verdict).rstrip(), flush=True)
        if result.note:
            print(textwrap.indent(textwrap.fill(result.note, 110), "    "), flush=True)
    verdicts = [result.verdict for result in results]
    counts = ", ".join(f"{verdicts.count(word)} {word.lower()}" for word in ("met", "MISSED", "missing", "FAILED"))
    seconds, load = time.monotonic() - start, _load_average()
    print(f"\n{counts}; {seconds:.0f} s; load average at the end {load}")
    if args.json:
        header = {"machine": about, "quick": args.quick, "seconds": round(seconds), "load_at_end": load}
        args.json.write_text(
            json.dumps({**header, "results": [result.as_json() for result in results]}, indent=2) + "\n"
        )
    if args.svg:
        args.svg.write_text(plot([result.bars for result in results if result.bars], _plot_note(about)))
    if args.markdown:
        args.markdown.write_text("".join(_markdown(about, results)))
    return int("FAILED" in verdicts)


def measured(names: list[str], pace: Pace) -> Iterator[Result]:
    """Measures the rows in order. A row that raises is reported as failed, and the next one is measured."""
    for name in names:
        try:
            yield from ROWS[name](pace)
        except Exception as error:  # noqa: BLE001 -- one broken row must not stop the others
            traceback.print_exc()
            yield Result(f"row {name}", None, note=f"{type(error).__name__}: {error}", failed=True)


def machine() -> dict[str, str]:
    """Describes the machine, the packages and the servers."""
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "load": f"{_load_average()} (load average at the start)",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "servers": ", ".join(_server_versions()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _load_average() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _server_versions() -> Iterator[str]:
    for name in rows.SERVERS:
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


def _plot_note(about: dict[str, str]) -> str:
    machine_name = about["machine"].partition(f", {platform.system()}")[0]
    return f"200 B payloads, medians of interleaved turns. {machine_name}, {about['when'][:10]}"


def _markdown(about: dict[str, str], results: list[Result]) -> Iterator[str]:
    yield HEADING
    yield from (f"- {name}: {value}\n" for name, value in about.items())
    yield "\n| what | measured | budget | |\n|---|---|---|---|\n"
    for result in results:
        verdict = f"**{result.verdict}**" if result.verdict == "MISSED" else result.verdict
        cells = (
            f"{result.what}{f'<br>{result.note}' if result.note else ''}",
            result.measured,
            result.budget or "",
            verdict,
        )
        yield f"| {' | '.join(map(str, cells))} |\n"


def _arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python tests/bench", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        action="append",
        choices=ROWS,
        metavar="ROW",
        help=f"one of {', '.join(ROWS)}; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="run for about a minute: fewer rounds, smaller stores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="plot the alternatives (rows peers, databases)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
