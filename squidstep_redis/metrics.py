"""Prometheus metrics of stores: pip install 'squidstep_redis[prometheus]'.

    store = StepRunStore.from_url(url)
    observe(store)

The counters cover the calls of this process. The numbers of live claims, lapsed claims and failed steps cover the whole
server, and are queried at each collection. `squidstep dashboard` prints a Grafana dashboard of all metrics; it is the
file `grafana_dashboard.json` next to this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ImportError(
        "squidstep_redis.metrics needs prometheus_client: pip install 'squidstep_redis[prometheus]'"
    ) from missing

from squidstep_redis import AsyncStepRunStore, Event, ServerError, SquidstepError, StepRunStore
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.blocking import BlockingTransport, run_workflow
from squidstep_redis.transport.client import addresses_of
from squidstep_redis.transport.helper import Helper

_RETRY_SECONDS: Final = 1.0  # to the last attempt: an outage must not delay the other metrics
_COLLECT_SECONDS: Final = 5.0  # half of Prometheus' default scrape timeout

_Counts = tuple[int, int, int]
"""Live claims, lapsed claims and failed steps."""

_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def observe(store: StepRunStore | AsyncStepRunStore, registry: CollectorRegistry = REGISTRY) -> None:
    """Counts a store's decisions from now on, and measures its calls.

    | metric | labels | counts |
    |---|---|---|
    | `squidstep_executes_total` | prefix | claims granted |
    | `squidstep_takeovers_total` | prefix | claims granted over a claim whose lease had expired |
    | `squidstep_skips_total` | prefix, reason | deliveries that did not execute |
    | `squidstep_completions_total`, `…_failures_total`, `…_releases_total` | prefix | claims that ended this way |
    | `squidstep_stale_calls_total` | prefix, operation | calls with a claim that was lost |
    | `squidstep_errors_total` | prefix, operation, error | calls that raised any other error |
    | `squidstep_extensions_total` | prefix | leases extended, by the heartbeat or by `extend_claim` |
    | `squidstep_batched_total` | prefix, operation | decisions and errors in batches, such as the heartbeat's |
    | `squidstep_transition_seconds` | prefix, operation | seconds per call with an event, with re-sends; no batches |
    | `squidstep_live_claims`, `squidstep_lapsed_claims` | prefix | claims on the whole server; blocking stores only |
    | `squidstep_failed_steps` | prefix | failed steps on the whole server; blocking stores only |

    The last three are read from each observed server. For each prefix and server, a collection needs ten round trips on
    the blocking store that was observed last. If stores with one prefix are on several servers, or in several
    databases, their numbers are added up. If one of these servers is unreachable, they are omitted for that prefix.
    Servers are told apart by the address in the client: connect to each under one name.

    An outage does not hide the other metrics. All servers are queried side by side, each in a thread. If servers cannot
    be reached, a collection takes a second longer, however many stores are observed. If a server hangs, it waits for
    one attempt, as long as the client's timeouts allow: 3 s for a store of `from_url`. It ends after 5 s in any case,
    also if the client has no timeouts.

    Args:
        store: the store; pass each store only once, or its decisions are counted twice.
        registry: the registry of the metrics.
    """
    metrics = _metrics.get(registry)
    if metrics is None:
        metrics = _metrics[registry] = Metrics(registry)
    store.on_event(metrics.count)
    if isinstance(store, StepRunStore):
        metrics.add_store(store)


class Metrics(Collector):
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Makes the metrics and registers them.

        Args:
            registry: the registry of the metrics.
        """

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"squidstep_{name}", help, ["prefix", *labels], registry=registry)

        self._executes = counter("executes", "Claims granted")
        self._takeovers = counter("takeovers", "Claims granted over a claim whose lease had expired")
        self._skips = counter("skips", "Deliveries that did not execute", "reason")
        self._by_kind = {
            "complete": counter("completions", "Steps completed"),
            "fail": counter("failures", "Attempts that failed"),
            "release": counter("releases", "Claims released"),
            "extend": counter("extensions", "Leases extended"),
        }
        self._refused = counter("stale_calls", "Calls with a claim that was lost", "operation")
        self._errors = counter("errors", "Calls that raised any other error", "operation", "error")
        self._batched = counter("batched", "Decisions and errors of calls in batches", "operation")
        self._seconds = Histogram(
            "squidstep_transition_seconds",
            "Seconds per call, re-sends included",
            ["prefix", "operation"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._servers: list[_Server] = []
        registry.register(self)

    def add_store(self, store: StepRunStore) -> None:
        """Queries the numbers of claims and failed steps of a store's prefix and server at each collection.

        Args:
            store: a blocking store. It replaces an earlier one with the same prefix and server.
        """
        addresses = addresses_of(store.client)
        server = next((each for each in self._servers if each.addresses & addresses), None)
        if server is None:
            server = _Server()
            self._servers.append(server)
        server.addresses |= addresses
        server.stores[store.calls.prefix] = store

    def count(self, event: Event) -> None:
        """Counts one decision.

        Args:
            event: the store's event.
        """
        prefix = event.prefix
        if event.kind == "execute":
            self._executes.labels(prefix).inc()
            if event.takeover:
                self._takeovers.labels(prefix).inc()
        elif event.kind == "skip":
            self._skips.labels(prefix, event.reason).inc()
        elif event.kind == "refuse":
            self._refused.labels(prefix, event.operation).inc()
        elif event.kind == "error":
            self._errors.labels(prefix, event.operation, event.reason).inc()
        elif event.kind in self._by_kind:
            self._by_kind[event.kind].labels(prefix).inc()
        if event.batched:
            self._batched.labels(prefix, event.operation).inc()
        elif event.first:
            self._seconds.labels(prefix, event.operation).observe(event.seconds)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Yields the metrics that `collect` queries, without values."""
        yield GaugeMetricFamily("squidstep_live_claims", "Claims under a lease", labels=["prefix"])
        yield GaugeMetricFamily("squidstep_lapsed_claims", "Claims whose lease has expired", labels=["prefix"])
        yield GaugeMetricFamily("squidstep_failed_steps", "Steps that have failed", labels=["prefix"])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Queries the servers side by side, for at most five seconds."""
        until = time.monotonic() + _COLLECT_SECONDS
        families = list(self.describe())
        counts: dict[str, list[_Counts | None]] = {}
        for prefixes, reading in [(list(server.stores), server.read()) for server in list(self._servers)]:
            reading.wait(until)
            if reading.error is not None:
                raise reading.error
            for prefix in prefixes:
                counts.setdefault(prefix, []).append(reading.counts.get(prefix))
        for prefix, by_server in counts.items():
            known = [each for each in by_server if each is not None]
            if len(known) == len(by_server):  # otherwise omitted, so that the other metrics are still collected
                for family, numbers in zip(families, zip(*known, strict=True), strict=True):
                    family.add_metric([prefix], sum(numbers))
        yield from families


class _Server:
    """One observed server.

    Attributes:
        addresses: the addresses of the clients.
        stores: by prefix, the store that queries it.
    """

    def __init__(self) -> None:
        self.addresses: frozenset[str] = frozenset()
        self.stores: dict[str, StepRunStore] = {}
        self._reading: _Reading | None = None

    def read(self) -> _Reading:
        """Begins to query the server, unless another collection does: a server that hangs occupies one thread."""
        reading = self._reading
        if reading is None or not reading.is_running:
            reading = self._reading = _Reading(dict(self.stores))
        return reading


class _Reading(Helper):
    """Queries one server, in a thread.

    Attributes:
        counts: by prefix, what was read so far.
    """

    def __init__(self, stores: dict[str, StepRunStore]) -> None:
        self.counts: dict[str, _Counts] = {}
        super().__init__("squidstep-metrics", partial(self._count, stores))

    def _count(self, stores: dict[str, StepRunStore]) -> None:
        for prefix, store in stores.items():
            internals: Any = store
            transport: BlockingTransport = internals._transport.limited(_RETRY_SECONDS)
            try:
                live, lapsed = run_workflow(transport, store.calls.count_claims())
                self.counts[prefix] = live, lapsed, run_workflow(transport, store.calls.count_failed())
            except ServerError as error:
                if error.transient:  # the next store would wait as long
                    break
            except SquidstepError:  # of this prefix only
                continue


_metrics: WeakKeyDictionary[CollectorRegistry, Metrics] = WeakKeyDictionary()
