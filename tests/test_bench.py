"""The benchmark: its command works, and its arithmetic is right. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench.measure import Budget, Pace, Result, Side, Spread, figure, measure_in_turns
from bench.plot import plot

BENCH = Path(__file__).with_name("bench")


def test_the_command_prints_its_table_and_keeps_it(tmp_path: Path) -> None:
    kept, drawn = tmp_path / "results.json", tmp_path / "peers.svg"
    written = tmp_path / "results.md"
    options = ["--quick", "--only", "peers", "--only", "import", "--json", kept, "--svg", drawn, "--markdown", written]
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
    assert len(rows) == 1 + len(results)
    assert all(row.count(" | ") == 3 for row in rows)
    texts = [element.text for element in ElementTree.parse(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {"squidstep_redis", "Lock + HSET"} <= set(texts)


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
def test_the_verdict(budget: Budget | None, value: float | Spread | None, verdict: str) -> None:
    assert Result("it", value, budget=budget).verdict == verdict


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (1, "1.00"), (12.345, "12.3"), (1234.5, "1,234")]
)
def test_a_figure_has_three_digits_that_count(value: float, text: str) -> None:
    assert figure(value) == text


def test_the_plot_puts_the_fastest_first_and_escapes_names() -> None:
    root = ElementTree.fromstring(plot([{"panel": "a < b", "rates": {"squidstep": 10.0, "R&D": 100.0}}], "a note"))
    bars = [float(bar.get("width", "")) for bar in root.iter("{http://www.w3.org/2000/svg}rect") if bar.get("rx")]
    assert bars == sorted(bars, reverse=True)
    names = [
        text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class") in ("name", "ours")
    ]
    assert names == ["R&D", "squidstep_redis"]
