"""A job whose store is configured and observed before the worker forks, in prometheus_client's multiprocess mode."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, values
from redis import Redis
from rq import Queue, Worker, get_current_job

from squidstep_redis import StepRunStore
from squidstep_redis.metrics import observe
from squidstep_redis.rq import configure, step


def process_name() -> str:
    job = get_current_job()
    return job.worker_name if job is not None and job.worker_name else str(os.getpid())


values.ValueClass = values.MultiProcessValue(process_name)

URL = os.environ["SQUIDSTEP_REDIS_URL"]
store = StepRunStore.from_url(URL)
observe(store, CollectorRegistry())
configure(store=store)


@step("charge", run_id="order-{order_id}")
def charge(order_id: int) -> int:
    return os.getpid()


def work() -> None:
    """Executes one job here, and four in the work-horses of one worker: two of them are redeliveries."""
    connection = Redis.from_url(URL)
    queue = Queue("steps", connection=connection)
    jobs = [queue.enqueue(charge, order_id) for order_id in (1, 2, 3, 2)]
    charge(1)
    Worker([queue], name="till-3", connection=connection).work(burst=True)
    results = [job.return_value() for job in jobs]
    assert results[0] == os.getpid()
    assert results[1] == results[3]
    assert len({os.getpid(), *results}) == 3  # the steps of orders 2 and 3 were executed by different work-horses
