"""Metrics of stores for Prometheus: the extra `prometheus`.

    store = StepRunStore.from_url(url)
    observe(store)

What is counted is what this process decided; live and lapsed claims are those of the whole server, asked for when the
metrics are collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from squidstep_redis import AsyncStepRunStore, Event, SquidstepError, StepRunStore

_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def observe(store: StepRunStore | AsyncStepRunStore, registry: CollectorRegistry = REGISTRY) -> None:
    """Has a store's decisions counted, and the time that its calls take.

    | metric | labels | counts |
    |---|---|---|
    | `squidstep_executes_total` | prefix | claims granted |
    | `squidstep_takeovers_total` | prefix | … of them over a claim whose lease had ended |
    | `squidstep_skips_total` | prefix, reason | deliveries that did not execute |
    | `squidstep_completions_total`, `…_failures_total`, `…_releases_total` | prefix | claims that ended |
    | `squidstep_refused_zombies_total` | prefix, operation | calls on a claim that was not held any more |
    | `squidstep_errors_total` | prefix, error | calls that raised anything else |
    | `squidstep_transition_seconds` | prefix, operation | what they took, re-sends included; batches not |
    | `squidstep_live_claims`, `squidstep_lapsed_claims` | prefix | of the whole server; of a blocking store only |

    A collection takes one round trip per server for the last two. If the server cannot be asked, they are left out.

    Args:
        store: counted from now on. Give each store once.
        registry: where the metrics are to be found.
    """
    metrics = _metrics.get(registry)
    if metrics is None:
        metrics = _metrics[registry] = Metrics(registry)
    store.on_event(metrics.count)
    if isinstance(store, StepRunStore):
        metrics.ask(store)


class Metrics(Collector):
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"squidstep_{name}", help, ["prefix", *labels], registry=registry)

        self._executes = counter("executes", "Claims granted")
        self._takeovers = counter("takeovers", "Claims granted over one whose lease had ended")
        self._skips = counter("skips", "Deliveries that did not execute", "reason")
        self._ended = {
            "complete": counter("completions", "Steps completed"),
            "fail": counter("failures", "Attempts that failed"),
            "release": counter("releases", "Claims given back"),
        }
        self._refused = counter("refused_zombies", "Calls on a claim that was not held any more", "operation")
        self._errors = counter("errors", "Calls that raised anything else", "error")
        self._seconds = Histogram(
            "squidstep_transition_seconds",
            "What a transition took, re-sends included",
            ["prefix", "operation"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._stores: dict[str, StepRunStore] = {}
        registry.register(self)

    def ask(self, store: StepRunStore) -> None:
        """Has the claims of the store's prefix counted at each collection."""
        self._stores[store.calls.prefix] = store

    def count(self, event: Event) -> None:
        """Takes in one decision."""
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
            self._errors.labels(prefix, event.reason).inc()
        elif event.kind in self._ended:
            self._ended[event.kind].labels(prefix).inc()
        if not event.batched and not (event.operation == "advance_step" and event.kind == "complete"):
            self._seconds.labels(prefix, event.operation).observe(event.seconds)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """The names of what `collect` asks the server for, without asking it."""
        yield GaugeMetricFamily("squidstep_live_claims", "Claims under a lease", labels=["prefix"])
        yield GaugeMetricFamily("squidstep_lapsed_claims", "Claims whose lease is over", labels=["prefix"])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Asks the server."""
        live, lapsed = self.describe()
        for prefix, store in list(self._stores.items()):
            try:
                counts = store.count_claims()
            except SquidstepError:
                continue  # no number is better than an old one, and the other metrics are not to be lost
            live.add_metric([prefix], counts.live)
            lapsed.add_metric([prefix], counts.lapsed)
        yield live
        yield lapsed


_metrics: WeakKeyDictionary[CollectorRegistry, Metrics] = WeakKeyDictionary()
