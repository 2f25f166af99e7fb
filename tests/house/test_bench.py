"""The benchmark: its command works, and its arithmetic is right. How fast anything is, is not tested."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench.__main__ import measured
from bench.crew import Crew, measure_crews
from bench.measure import QUICK, Bars, Budget, Pace, Result, Side, Spread, Work, figure, measure_in_turns
from bench.plot import plot
from bench.report import with_performance

BENCH = Path(__file__).parents[1] / "bench"
README = Path(__file__).parents[2] / "README.md"


def test_the_command_prints_its_table_and_keeps_it(tmp_path: Path) -> None:
    kept, drawn = tmp_path / "results.json", tmp_path / "peers.svg"
    written, readme = tmp_path / "results.md", tmp_path / "README.md"
    readme.write_text(README.read_text("utf-8"), "utf-8")
    options = ["--quick", "--only", "peers", "--only", "import", "--json", kept, "--svg", drawn, "--markdown", written]
    options += ["--readme", readme]
    ran = subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True, check=True)
    results = json.loads(kept.read_text())["results"]
    assert [line.split() for line in ran.stdout.splitlines() if line.startswith("what ")] == [
        ["what", "budget", "measured", "(middle", "half)"]
    ]
    for result in results:
        line = next(line for line in ran.stdout.splitlines() if line.startswith(result["what"]))
        assert line.endswith(result["verdict"])
        assert result["verdict"] in ("", "met", "MISSED", "missing")
        assert (result["measured"] is None) == (result["verdict"] == "missing")
    assert {"against redis-py's Lock around an HSET", "import squidstep_redis, beyond import redis"} <= {
        result["what"] for result in results
    }
    rows = [line for line in written.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(results)  # a table for each row of the benchmark
    assert all(row.count(" | ") == 3 for row in rows)
    texts = [element.text for element in ElementTree.parse(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"squidstep_redis", "Lock + HSET"} <= set(texts)
    assert "| redis-py's `Lock` around an `HSET` | " in readme.read_text("utf-8")


def test_a_row_that_is_not_there_is_refused() -> None:
    ran = subprocess.run([sys.executable, BENCH, "--only", "nothing"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "'wire'" in ran.stderr


def test_the_sides_take_turns_in_whole_lots() -> None:
    turns: list[tuple[str, int]] = []
    sides = {
        "a": lambda count: turns.append(("a", count)),
        "b": Side(lambda count: turns.append(("b", count)), 10),
    }
    measured = measure_in_turns(Pace(seconds=0, turn=0, scale=1), sides)
    assert [name for name, _ in turns[-10:]] == ["a", "b"] * 5
    assert all(count % 10 == 0 for name, count in turns if name == "b")
    assert {name: len(each) for name, each in measured.seconds.items()} == {"a": 5, "b": 5}


def test_a_ratio_is_of_rates_round_by_round() -> None:
    turns = measure_in_turns(Pace(seconds=0, turn=0, scale=1), {"fast": lambda _: None, "slow": lambda _: None})
    turns.seconds |= {"fast": [1.0, 2.0, 1.0, 1.0, 1.0], "slow": [2.0, 4.0, 3.0, 2.0, 50.0]}
    assert turns.times("fast", "slow").median == 2
    assert turns.rate("fast") == 1


@pytest.mark.parametrize(
    ("budget", "value", "verdict"),
    [
        (Budget.at_least(2), 2.0, "met"),
        (Budget.at_least(2), 1.9, "MISSED"),
        (Budget.at_most(2), 2.0, "met"),
        (Budget.at_most(2), Spread(2.1, 1, 3), "MISSED"),
        (None, 2.0, ""),
        (Budget.at_most(2), None, "missing"),
    ],
)
def test_verdict_compares_value_and_budget(budget: Budget | None, value: float | Spread | None, verdict: str) -> None:
    assert Result("it", value, budget=budget).verdict == verdict


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (1, "1.00"), (12.345, "12.3"), (1234.5, "1,234")]
)
def test_a_figure_has_three_significant_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_the_plot_puts_the_fastest_first_and_escapes_names() -> None:
    panel = Bars("a < b", {"squidstep_redis": 10.0}, {"R&D": (100.0, 0.1)})
    root = ElementTree.fromstring(plot([panel], "a note"))
    bars = [float(bar.get("width", "")) for bar in root.iter("{http://www.w3.org/2000/svg}rect") if bar.get("rx")]
    assert bars == sorted(bars, reverse=True)
    names = [
        text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class") in ("name", "ours")
    ]
    assert names == ["R&D", "squidstep_redis"]


def test_a_package_that_is_missing_is_named_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    (result,) = measured("uvloop", QUICK)
    assert (result.verdict, result.note) == ("missing", "uvloop: pip install uvloop")


def test_only_the_performance_section_of_the_readme_is_replaced() -> None:
    before = README.read_text("utf-8")
    found = [
        Result("a lock", 2.345, summary=("a `Lock`", "single")),
        Result("a lock, in batches", 45.6, summary=("a `Lock`", "batch")),
        Result("memory", 123.4, "bytes", summary=("200", "bytes")),
        Result("not in the README", 1),
    ]
    after = with_performance(before, {"row": ("", found)})
    head, _, tail = before.partition("## Performance\n")
    assert after.startswith(head)
    assert after.endswith(tail[tail.index("\n## ") :])
    assert "\n| a `Lock` | 2.35 | 46 |\n" in after
    assert "uses 123 bytes in addition to payloads of 200 bytes." in after
    assert with_performance(after, {"row": ("", found)}) == after


def test_crews_take_turns_with_what_they_do(tmp_path: Path) -> None:
    @contextlib.contextmanager
    def worker(number: int) -> Iterator[Mapping[str, Work]]:
        def fast(_: int) -> None:
            time.sleep(0.001)

        def slow(_: int) -> None:
            (tmp_path / f"{number}-{os.getpid()}").touch()
            time.sleep(0.01)

        yield {"fast": fast, "slow": slow}

    with Crew(2, worker) as crew:
        found = measure_crews({"fast": (crew, "fast"), "slow": (crew, "slow")}, 0.05)
    assert len(found.turns.seconds["fast"]) == len(found.turns.seconds["slow"]) == 5
    assert found.turns.rate("fast") > found.turns.rate("slow")
    assert found.slowest["slow"] >= 10
    assert [path.name[:2] for path in sorted(tmp_path.iterdir())] == ["0-", "1-"]
