"""A newcomer finds out from the page alone why a run is stuck, and what to do."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.stuck_runs import STUCK_RUNS
from support.web import Site


@pytest.mark.parametrize("name", STUCK_RUNS)
@pytest.mark.parametrize("path", ["/run?id={}", "/step?run={}&step=pay"], ids=["run", "step"])
def test_the_page_says_why_and_what_to_do(bench: Bench, name: str, path: str) -> None:
    site, stuck, run = Site(bench, actions=True), STUCK_RUNS[name], f"order-{name}"
    stuck.prepare(bench, site.store, run)
    before = bench.dump()

    page = site.get(path.format(run))

    assert page.status == 200
    for sentence in (stuck.headline, *stuck.says, *(each.replace("RUN", run) for each in stuck.commands)):
        assert sentence in page.text
    offered = [action.partition("?")[0] for action in page.forms() if "step=" in action or "/resume" in action]
    assert sorted(set(offered)) == stuck.actions
    assert bench.dump() == before


def test_a_completed_run_needs_nothing(site: Site) -> None:
    claim = site.store.begin_step("order-1", "pay", {}).step_run
    site.store.complete_step(claim, {})
    page = site.get("/run?id=order-1")
    assert "It is finished" in page.text
    assert "nothing is left to do" in page.text


def test_steps_in_one_state_are_explained_together(site: Site) -> None:
    site.store.schedule_steps("order-1", {f"step-{number}": {} for number in range(9)})
    page = site.get("/run?id=order-1")
    assert page.text.count("Until one arrives, nothing happens.") == 1
    assert "8 more in this state" in page.text
    assert page.text.count("no worker has claimed it since") == 9
    assert all(f"step=step-{number}" in page.html for number in range(9))


def test_a_long_run_says_how_much_is_not_explained(site: Site) -> None:
    site.store.schedule_steps("order-1", {f"step-{number}": {} for number in range(60)})
    assert "10 further steps are not completed" in site.get("/run?id=order-1").text
