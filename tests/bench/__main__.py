"""Compares squidstep_redis with the bare protocol and with its alternatives, and measures it at scale. Prints a table.

    python tests/bench [--quick] [--only ROW] [--json FILE] [--svg FILE] [--markdown FILE] [--readme FILE]

It starts and stops the servers that it needs. Rows whose packages or servers are not installed are shown as missing.
What is committed is made by one command, on a machine without other load:

    python tests/bench --svg tests/bench/results.svg --markdown tests/bench/RESULTS.md --readme README.md
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `bench` is a package in tests/, and uses tests/support

from bench import alternatives, features, heartbeat, instructions, report, scale, yardstick
from bench.measure import FULL, QUICK, MissingError, Pace, Result
from bench.plot import plot

Row = Callable[[Pace], Iterator[Result]]  # measures, and yields results

ROWS: dict[str, Row] = {
    "wire": yardstick.against_the_wire,
    "instructions": instructions.instructions,
    "payloads": yardstick.payload_sizes,
    "successors": features.successors,
    "chains": features.chains,
    "events": features.events,
    "reads": features.reads,
    "import": features.import_time,
    "peers": alternatives.against_peers,
    "databases": alternatives.against_databases,
    "workers": alternatives.durable_workers,
    "asyncio": yardstick.on_asyncio,
    "uvloop": yardstick.on_uvloop,
    "cluster": yardstick.on_a_cluster,
    "heartbeat": heartbeat.heartbeat,
    "long-run": scale.long_run,
    "many-steps": scale.many_steps,
    "processes": scale.many_processes,
    "indexes": scale.indexes,
    "first": scale.first_transitions,
    "lists": scale.lists,
}


def main() -> int:
    """Returns the exit status: 1 if a row raised an exception, else 0, even if a budget is missed."""
    args = _arguments()
    about = report.machine()
    for name, value in about.items():
        print(f"{name:<10} {value}")
    print(f"\n{report.title_line()}")
    results: dict[str, tuple[str, list[Result]]] = {}
    start = time.monotonic()
    for name in args.only or ROWS:
        results[name] = ((ROWS[name].__doc__ or "").partition("\n")[0], [])
        for result in measured(name, QUICK if args.quick else FULL):
            results[name][1].append(result)
            print(report.line(result), flush=True)
            if result.note:
                print(textwrap.indent(textwrap.fill(result.note, 110), "    "), flush=True)
    seconds, load = round(time.monotonic() - start), report.load_average()
    print(f"\n{report.verdicts(results)}; {seconds} s; load average at the end {load}")
    found = [result for _, of_row in results.values() for result in of_row]
    if args.json:
        header = {"machine": about, "quick": args.quick, "seconds": seconds, "load_at_end": load}
        args.json.write_text(json.dumps({**header, "results": [it.as_json() for it in found]}, indent=2) + "\n")
    if args.svg:
        args.svg.write_text(plot([result.bars for result in found if result.bars], report.plot_note(about)))
    if args.markdown:
        args.markdown.write_text(report.markdown(about, results))
    if args.readme:
        args.readme.write_text(report.with_performance(args.readme.read_text("utf-8"), results), "utf-8")
    return int(any(result.failed for result in found))


def measured(name: str, pace: Pace) -> Iterator[Result]:
    """Measures a row. If it raises, it is reported as failed."""
    try:
        yield from ROWS[name](pace)
    except MissingError as missing:
        yield Result(f"row {name}", None, note=str(missing))
    except Exception as error:
        traceback.print_exc()
        yield Result(f"row {name}", None, note=f"{type(error).__name__}: {error}", failed=True)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(prog="python tests/bench", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        action="append",
        choices=ROWS,
        metavar="ROW",
        help=f"one of {', '.join(ROWS)}; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="run for about two minutes: fewer rounds, smaller stores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="plot rates: rows peers, databases, workers, asyncio")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="replace the section about performance of a README")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
