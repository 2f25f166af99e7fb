"""The alternatives. Each executes one step per operation, with the minimum that its own API requires.

An alternative that stores less than squidstep_redis (no input, no claim, no order) is measured as it is.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from itertools import count as numbers
from pathlib import Path
from typing import Any

import msgpack
import redis
from bench.measure import MissingError, Work
from bench.ours import LEASE, PAYLOAD, STEPS_OF_A_RUN, new_names

_RUNS = 100_000


def set_nx_and_set(client: redis.Redis) -> Work:
    """The simplest claim: the worker that sets the key first executes, then stores the result."""

    def steps(count: int) -> None:
        for run, step in new_names(count):
            key = f"nx:{run}:{step}"
            if client.set(key, msgpack.packb(PAYLOAD), nx=True, px=LEASE * 1_000):
                client.set(key, msgpack.packb(PAYLOAD))

    return steps


def lock_around_hset(client: redis.Redis) -> Work:
    """The usual hand-written solution: under redis-py's lock, check a hash for a result, else store one.

    Without the check, a later delivery would repeat the work.
    """

    def steps(count: int) -> None:
        for run, step in new_names(count):
            with client.lock(f"lock:{run}:{step}", timeout=LEASE):
                if client.hget("locked:" + run, step) is None:
                    client.hset("locked:" + run, step, msgpack.packb(PAYLOAD))

    return steps


def powertools(client: redis.Redis) -> Work:
    """The idempotency decorator of Powertools for AWS Lambda, on Redis. It stores the result but not the input."""
    try:
        from aws_lambda_powertools.utilities.idempotency import idempotent_function
        from aws_lambda_powertools.utilities.idempotency.persistence.cache import CachePersistenceLayer
    except ImportError as error:
        raise MissingError("Powertools: pip install 'aws-lambda-powertools[aws-sdk,redis]'") from error

    warnings.filterwarnings("ignore", "Couldn't determine the remaining time")  # not running in a Lambda
    layer: Any = CachePersistenceLayer(client=client)

    @idempotent_function(data_keyword_argument="key", persistence_store=layer)
    def work(key: str) -> dict[str, Any]:
        return PAYLOAD

    def steps(count: int) -> None:
        for run, step in new_names(count):
            work(key=f"{run}:{step}")

    return steps


@contextlib.contextmanager
def source_sql(url: str, synchronous_commit: str, runs: list[uuid.UUID]) -> Iterator[Work]:
    """The source's SQL on PostgreSQL: its columns, indexes and statements, each committed separately.

    Beginning a step inserts the row unless it exists, and reads it. Completing a step updates the row if it is running,
    and rereads it. That is four round trips of prepared statements, as with the source's driver.

    Args:
        url: of the database.
        synchronous_commit: PostgreSQL's setting of that name.
        runs: the runs to work on, of `source_tables`. No other connection may work on them.
    """
    import psycopg
    from psycopg.types.json import Jsonb

    insert = """insert into step_runs (id, run_id, step, status, input, inserted_at, updated_at)
        values (%s, %s, %s, 'running', %s, now(), now()) on conflict (run_id, step) do nothing"""
    columns = "id, run_id, step, status, input, output, last_error, recovery, resume, manual, inserted_at, updated_at"
    read = f"select {columns} from step_runs where run_id = %s and step = %s"
    update = """update step_runs set status = 'completed', output = %s, last_error = null, resume = null, manual = null,
        updated_at = now() where id = %s and status = 'running'"""
    read_by_id = f"select {columns} from step_runs where id = %s"

    options = f"-c synchronous_commit={synchronous_commit}"
    with psycopg.connect(url, autocommit=True, prepare_threshold=0, options=options) as connection:
        step_numbers = numbers()

        def steps(count: int) -> None:
            for _ in range(count):
                number = next(step_numbers)
                run, step = runs[number // STEPS_OF_A_RUN % len(runs)], f"step-{number % STEPS_OF_A_RUN}"
                if connection.execute(insert, (uuid.uuid4(), run, step, Jsonb(PAYLOAD))).rowcount != 1:
                    raise RuntimeError(f"{run} {step} exists already")
                row = connection.execute(read, (run, step)).fetchone()
                assert row is not None
                if connection.execute(update, (Jsonb(PAYLOAD), row[0])).rowcount != 1:
                    raise RuntimeError(f"{run} {step} was not running")
                connection.execute(read_by_id, (row[0],)).fetchone()

        yield steps


def source_tables(url: str) -> list[uuid.UUID]:
    """Creates the source's tables, and the runs that the steps refer to; returns the runs.

    Raises:
        MissingError: psycopg is not installed.
    """
    try:
        import psycopg
    except ImportError as error:
        raise MissingError("psycopg: pip install 'psycopg[binary]'") from error
    with psycopg.connect(url, autocommit=True) as connection:
        return _source_tables(connection)


def _source_tables(connection: Any) -> list[uuid.UUID]:
    connection.execute("drop table if exists step_runs, runs")
    connection.execute("create table runs (id uuid primary key)")
    connection.execute(
        """create table step_runs (
            id uuid primary key,
            run_id uuid not null references runs on delete cascade,
            step varchar(255) not null,
            status varchar(255) not null,
            input jsonb not null default '{}',
            output jsonb, last_error jsonb, recovery jsonb, resume jsonb, manual jsonb,
            inserted_at timestamp not null,
            updated_at timestamp not null
        )"""
    )
    connection.execute("create index on step_runs (run_id)")
    connection.execute("create index on step_runs (status)")
    connection.execute("create unique index on step_runs (run_id, step)")
    connection.execute("insert into runs select gen_random_uuid() from generate_series(1, %s)", (_RUNS,))
    connection.execute("analyze runs")
    return [row[0] for row in connection.execute("select id from runs")]


@contextlib.contextmanager
def dbos(url: str) -> Iterator[Work]:
    """DBOS Transact: ten-step workflows, in a process of its own because DBOS starts threads."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("dbos_workflows.py")), url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C goes to the benchmark only; this process exits when its input is closed
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output, input = process.stdout, process.stdin

    def steps(count: int) -> None:
        input.write(f"{count // STEPS_OF_A_RUN}\n")
        input.flush()
        if output.readline() != "done\n":
            raise RuntimeError(f"DBOS exited: {process.stderr and process.stderr.read()[-2_000:]}")

    with process:
        try:
            if output.readline() != "ready\n":
                problem = process.stderr.read()
                if "No module named 'dbos'" in problem:
                    raise MissingError("DBOS Transact: pip install dbos")
                raise RuntimeError(f"DBOS did not start: {problem[-2_000:]}")
            yield steps
        finally:
            input.close()


@contextlib.contextmanager
def dbos_on_sqlite() -> Iterator[Work]:
    """DBOS Transact on an SQLite file, with its default settings."""
    with (
        tempfile.TemporaryDirectory(prefix="squidstep-bench-") as directory,
        dbos(f"sqlite:///{directory}/db") as steps,
    ):
        yield steps
