"""The budgets: what the library has to reach. A result without a budget is only reported.

Ratios are rates in yardsticks: calls of a script with a single HSET, through redis-py, with the same kind of client.
"""

from __future__ import annotations

from typing import Final

from bench.measure import Budget

_at_least, _at_most = Budget.at_least, Budget.at_most

BUDGETS: Final = {
    "round trips": _at_most(1),
    "blocking": _at_least(1),
    "blocking, user's client": _at_least(0.85),
    "asyncio, 1 task": _at_least(1.2),
    "asyncio, 16 tasks": _at_least(2.2),
    "asyncio, 100 tasks": _at_least(2.5),
    "cluster": _at_least(0.9),
    "cluster, batch": _at_least(0.9),  # against one node
    "instructions": _at_most(3.5),
    "batch, ten runs": _at_least(0.9),
    "batch, 100 runs": _at_least(0.55),
    "Powertools": _at_least(1.4),
    "Powertools, batch": _at_least(10),
    "SQL, relaxed": _at_least(4),
    "SQL, relaxed, batch": _at_least(20),
    "SQL, durable, 64 workers": _at_least(3),
    "heartbeat, batches": _at_most(1),
    "heartbeat, ms": _at_most(20),
    "heartbeat, slice in ms": _at_most(2),
    "bytes beyond 200 B": _at_most(240),
    "bytes beyond 50 B": _at_most(110),
    "1,000,000 steps": _at_most(1.15),
    "run of 10,000": _at_most(1.1),
    "import, ms": _at_most(5),
    "first transition": _at_most(1.05),
    "listing, ms": _at_most(200),
    "index of runs, bytes": _at_most(100),
}
