"""Many workers of both stores under every fault at once: their results must be linearizable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from support.servers import find_binary, wait_until

from squidstep_redis.protocol import scripts

from .broken import DEFECTS, with_defect
from .mutants import Mutant
from .soak import Report, soak, soak_of_cancellations

MUTANTS = {
    # The claim
    "the claim token is not checked": Mutant("lib/record.lua", '(token == state.token or token == "")', "true"),
    "a non-holder can fail a step": Mutant(
        "fail_step.lua", "if not holds(state, token) then", 'if not holds(state, "") then'
    ),
    "a non-holder can release a step": Mutant(
        "release_step.lua", "if not holds(state, token) then", 'if not holds(state, "") then'
    ),
    "an extension revives a lost claim": Mutant(
        "extend_claim.lua", 'claim and (token == holder or token == "")', "claim"
    ),
    "an extension revives a failed claim": Mutant(
        "extend_claim.lua",
        "  local claim, holder, held",
        "  local failed = line and parse_state(line)\n"
        "  if failed and failed.status == @FAILED and failed.token == token then\n"
        '    failed.status, failed.ended = @RUNNING, ""\n'
        "    line = format_state(failed)\n  end\n  local claim, holder, held",
    ),
    "a completion after the lease is rejected without a takeover": Mutant(
        "complete_step.lua",
        "local SUCCESSORS = 6\n",
        "local SUCCESSORS = 6\n"
        'local held = redis.call("HGET", steps, "s" .. ARGV[2]) or ""\n'
        'local lease, started, created = string.match(held, "^1r %d+ %d* %S* (%d+) (%d*) %d* (%d+)")\n'
        'if lease and created + started + lease < redis.call("TIME")[1] * 1000 then\n'
        '  return { "missing", ARGV[1] }\nend\n',
    ),
    "a non-holder can complete a step in the common case": Mutant(
        "complete_step.lua", "    and holder == token\n", "    and holder\n"
    ),
    # The lease
    "the lease is ignored": Mutant("lib/begin.lua", "not remaining or remaining > 0", "false"),
    "a lease never ends": Mutant("lib/begin.lua", "not remaining or remaining > 0", "true"),
    "leases use the caller's clock": Mutant(
        "begin_step.lua",
        "local now = now_ms()",
        'local now = now_ms() + string.match(owner, "%d+") % 3 * 30 -- the workers\' clocks disagree',
    ),
    "an extension is counted from the start of the claim": Mutant(
        "extend_claim.lua", "started, ends)", 'started, lease ~= "" and created + started + lease or nil)'
    ),
    "an extension can only shorten a lease": Mutant(
        "lib/extend.lua", "local lease = ends - start", "local lease = math.min(held, ends - start)"
    ),
    "a re-sent begin renews the lease": Mutant(
        "lib/begin.lua",
        "if holds(state, token) then",
        "if holds(state, token) then\n  state.lease = now - state.created - state.started + lease\n"
        '  redis.call("HSET", steps, "s" .. step, format_state(state))',
    ),
    # Failures
    "a final failure can be claimed again": Mutant("lib/begin.lua", "state.status == @FINAL then\n", "false then\n"),
    "an ordinary failure is final": Mutant("fail_step.lua", 'delay == "final" and @FINAL or @FAILED', "@FINAL"),
    "a retry claims the step again and again": Mutant("retry_step.lua", "if resent then", "if false then"),
    "a retry keeps the attempt counter": Mutant("retry_step.lua", "state.released = state.attempt\n", "\n"),
    # Attempts
    "attempt numbers are skipped": Mutant("lib/begin.lua", "state.attempt + 1\n", "state.attempt + 2\n"),
    "a takeover does not increase the attempt": Mutant(
        "lib/begin.lua",
        "state.attempt = state.attempt + 1",
        "state.attempt = state.attempt + (lease_expired and 0 or 1)",
    ),
    "a release decreases the attempt": Mutant(
        "release_step.lua",
        "end_attempt(state, @PENDING, now)",
        "end_attempt(state, @PENDING, now)\nstate.attempt = state.attempt - 1",
    ),
    "a released attempt counts": Mutant("release_step.lua", "(tonumber(state.released) or 0) + 1", "state.released"),
    "one attempt too many": Mutant("lib/begin.lua", "used >= limit", "used > limit"),
    "a lapsed claim stays running when no attempt is left": Mutant(
        "lib/begin.lua", "    if lease_expired then\n      unretain", "    if false then\n      unretain"
    ),
    # Re-sent calls
    "a re-sent begin starts another attempt": Mutant("lib/begin.lua", "if holds(state, token) then", "if false then"),
    "the history forgets the begin of a past attempt": Mutant(
        "lib/begin.lua", "state.token == token or past_attempt(steps, step, state, token)", "state.token == token"
    ),
    "an ended claim does not recognize its begin": Mutant(
        "lib/begin.lua", "state.token == token or past_attempt", "past_attempt"
    ),
    "the history forgets how a past attempt failed": Mutant(
        "fail_step.lua", "and state or past_attempt(steps, step, state, token)", "and state or nil"
    ),
    "a re-sent failure may have another error": Mutant("fail_step.lua", "if stored == last_error then", "if true then"),
    "a re-sent completion may have another output": Mutant(
        "complete_step.lua", 'redis.call("HGET", steps, "o" .. step) == output', "true"
    ),
    "a re-sent completion takes another place in the order": Mutant(
        "complete_step.lua",
        'if resent and redis.call("HGET", steps, "o" .. step) == output then',
        'if resent and redis.call("HGET", steps, "o" .. step) == output then\n'
        '      redis.call("ZADD", done, run.completed + 1, step)',
    ),
    # The input
    "a different input is accepted": Mutant(
        "lib/begin.lua", "local other = other_fingerprint(steps, step, fingerprint)", "local other = nil"
    ),
    "a replaced input keeps its fingerprint": Mutant("lib/begin.lua", "elseif not scheduled then", "elseif false then"),
    # Completion
    "a completed step is executed again": Mutant(
        "lib/begin.lua", "if state.status == @COMPLETED then", "if state.status == @COMPLETED and now % 20 > 0 then"
    ),
    "completions are ordered by time": Mutant(
        "complete_step.lua", '"ZADD", done, completed, step', '"ZADD", done, math.floor(now / 250), step'
    ),
    "a completion writes before it checks": Mutant(
        "complete_step.lua",
        "-- include complete\n",
        '-- include complete\nredis.call("HSET", steps, "o" .. step, ARGV[4])\n',
    ),
    "a failure overwrites a completion": Mutant(
        "fail_step.lua",
        "if not holds(state, token) then",
        "if not holds(state, token) and not (state.status == @COMPLETED and state.token == token) then",
    ),
    "the scheduled input is replaced": Mutant(
        "lib/begin.lua", "if not scheduled then\n    written", "if true then\n    written"
    ),
}


# Without these kinds of events, a soak proves nothing.
BOTH = ("begin: execute", "begin: busy", "begin: completed", "begin: exhausted", "complete: done", "fail: stale")
BOTH = (*BOTH, "extend: stale", "takeovers", "zombies rejected", "replies never received", "sent more than once")
BOTH = (*BOTH, "completions found at the end", "workers killed", "replies lost")
GENERAL = (
    *BOTH,
    "begin: superseded",
    "begin: failed",
    "final: done",
    "retry: done",
    "begin: mismatch",
    "complete: stale",
    "release: stale",
    "expire: done",
    "server killed and restarted",
)
CANCELLATIONS = (*BOTH, "tasks cancelled", "extend: done", "release: done", "connections killed", "primaries demoted")


def check_histories(expected: Collection[str], rounds: int, run: Callable[[int], Report]) -> None:
    """Runs soaks, given their seeds, until every kind of event has occurred: one can be too short on a busy machine."""
    counts = Counter[str]()
    for seed in range(rounds):
        report = run(seed)
        assert_linearizable(report)
        counts += report.verdict.counts + report.faults
        if not missing(counts, expected):
            break
    assert not missing(counts, expected)


@pytest.mark.servers("valkey", "redis-7", "redis-6")
@pytest.mark.timeout(900)
def test_short_soak_is_linearizable(binary: Path, tmp_path: Path) -> None:
    check_histories(GENERAL, 8, lambda seed: soak(5, tmp_path / str(seed), binary=binary, seed=seed))


@pytest.mark.servers("valkey", "redis-7", "redis-6")
@pytest.mark.timeout(900)
def test_short_soak_of_cancellations_is_linearizable(binary: Path, tmp_path: Path) -> None:
    check_histories(
        CANCELLATIONS, 4, lambda seed: soak_of_cancellations(10, tmp_path / str(seed), binary=binary, seed=seed)
    )


def test_killed_soak_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from faults.soak import soak; from support.servers import find_binary\n"
    )
    code += "soak(100, Path(sys.argv[1]), binary=find_binary('valkey'))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.Popen(command, env=path, start_new_session=True)
    try:
        wait_until(lambda: sum(log.stat().st_size > 1_000 for log in tmp_path.glob("logs/*")) >= 6, timeout=120)
    finally:
        killed.kill()
        killed.wait()

    def is_gone() -> bool:
        try:
            os.killpg(killed.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(is_gone, timeout=30)


def test_every_mutant_applies(tmp_path: Path) -> None:
    for name, mutant in MUTANTS.items():
        lua = tmp_path / name.replace(" ", "-")
        shutil.copytree(scripts.directory(), lua)
        mutant.apply(lua)  # raises if the script no longer has the text


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("run", "expected"), [(soak, GENERAL), (soak_of_cancellations, CANCELLATIONS)], ids=["general", "cancellations"]
)
def test_long_soak_is_linearizable(
    run: Callable[..., Report],
    expected: Collection[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    say: Callable[..., None],
) -> None:
    seconds = request.config.getoption("--soak-seconds")

    def soak_aloud(seed: int) -> Report:
        report = run(seconds, tmp_path / str(seed), binary=find_binary("valkey"), seed=seed)
        say("", *report.lines())
        return report

    check_histories(expected, max(2, 200 // seconds), soak_aloud)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("defect", DEFECTS)
def test_broken_transport_is_caught(defect: str, tmp_path: Path, say: Callable[..., None]) -> None:
    report = soak_of_cancellations(120, tmp_path, binary=find_binary("valkey"), target=with_defect(defect))
    assert report.problems
    say(f" {report.seconds:.1f} s: {report.problems[0][:200]}")


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTANTS)
def test_broken_store_is_caught(name: str, tmp_path: Path, say: Callable[..., None]) -> None:
    lua = tmp_path / "lua"
    shutil.copytree(scripts.directory(), lua)
    MUTANTS[name].apply(lua)
    report = soak(120, tmp_path / "soak", binary=find_binary("valkey"), lua=lua)
    assert report.verdict.errors == []  # the mutant must be caught by its results, not by a script error
    assert report.problems
    say(f" {report.seconds:.1f} s: {report.problems[0][:200]}")


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Prints lines even if the test passes. Works only without xdist."""

    def say(*lines: str) -> None:
        with capfd.disabled():
            sys.stdout.write("".join(f"{line}\n" for line in lines))

    return say


def assert_linearizable(report: Report) -> None:
    assert (report.problems, report.verdict.findings.undecided, report.verdict.errors) == ([], [], [])


def missing(counts: Counter[str], expected: Collection[str]) -> list[str]:
    """Returns the kinds of events that did not occur."""
    return [name for name in expected if not counts[name]]
