"""Turns what the worker's parts know into what Prometheus scrapes.

In: sources of samples, asked at each scrape. Out: prometheus_client's families, in the catalogue's order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, cast

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from legit_worker.batching.histogram import Histogram
from legit_worker.metrics import catalogue
from legit_worker.metrics.catalogue import METRICS, PREFIX, Sample

#: How often a source is asked again whose dictionary changed size under it: nobody holds a lock.
TRIES = 10

Source = Callable[[], Iterable[Sample]]

FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class Collector:
    """As prometheus_client's exposition takes a registry. It has none, and so none of its locks."""

    def __init__(self, *sources: Source) -> None:
        self._sources = sources
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """Return all families: ours, and what is known of the process."""
        found: dict[str, list[Sample]] = defaultdict(list)
        for source in self._sources:
            for sample in _steady(source):
                found[sample[0]].append(sample)
        yield from (_family(metric, found[metric.name]) for metric in METRICS if found[metric.name])
        yield from self._process.collect()


def _steady(source: Source) -> list[Sample]:
    for _ in range(TRIES):
        with suppress(RuntimeError):  # a dictionary changed its size during iteration
            return list(source())
    return list(source())


def _family(metric: catalogue.Metric, samples: Iterable[Sample]) -> Metric:
    name = PREFIX + metric.name
    family = FAMILIES[metric.kind](name, metric.help, labels=metric.labels)
    for _, labels, value in samples:
        if len(labels) != len(metric.labels):
            raise ValueError(f"{name} has the labels {metric.labels}, and a sample has {labels}")
        if isinstance(value, Histogram):
            counts = value.at_most()
            bounds = [*(f"{float(bound)}" for bound in value.bounds), "+Inf"]
            family.add_metric(labels, buckets=list(zip(bounds, counts, strict=True)), sum_value=value.sum)
        else:
            family.add_metric(labels, value)
    return cast(Metric, family)
