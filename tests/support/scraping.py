"""Reads a worker's metrics and health over HTTP, as Prometheus and an orchestrator do.

In: a running worker with `LEGIT_WORKER_METRICS_PORT`. Out: numbers, by name and labels, parsed by prometheus_client.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from harness import ANSWER_SECONDS, Worker, poll
from prometheus_client.parser import text_string_to_metric_families

from legit_worker.metrics.catalogue import BY_NAME, PREFIX

#: Any free port: tests run beside each other.
SERVING = {"LEGIT_WORKER_METRICS_PORT": "0"}


@dataclass(frozen=True)
class Scrape:
    """What one scrape gave."""

    text: str

    def all(self, name: str) -> dict[tuple[str, ...], float]:
        """By the values of a sample's labels, in the order that docs/metrics.md has, and then the bucket's."""
        found = [
            sample
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == PREFIX + name
        ]
        order = [*BY_NAME[re.sub("_(bucket|count|sum)$", "", name)].labels, "le"]
        return {tuple(sample.labels[key] for key in order if key in sample.labels): sample.value for sample in found}

    def one(self, name: str, *labels: str) -> float:
        """One sample's value; 0 for a counter that nobody has counted yet."""
        return self.all(name).get(labels, 0.0)


@dataclass(frozen=True)
class Endpoint:
    """Where a worker serves."""

    port: int

    def get(self, path: str) -> tuple[int, str]:
        """The status and the body."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=ANSWER_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, path: str) -> tuple[int, dict[str, Any]]:
        """A probe's status and its reasons."""
        status, body = self.get(path)
        return status, json.loads(body)

    def scrape(self) -> Scrape:
        """All metrics."""
        status, body = self.get("/metrics")
        assert status == 200, body
        return Scrape(body)

    def wait_for(self, name: str, *labels: str, value: float) -> Scrape:
        """Until a sample has this value."""

        def found() -> Scrape | None:
            scrape = self.scrape()
            return scrape if scrape.one(name, *labels) == value else None

        try:
            scrape = poll(found, f"{name}{labels} to be {value}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.scrape().all(name)}") from None
        assert scrape is not None
        return scrape


def endpoint_of(worker: Worker) -> Endpoint:
    """Where this worker serves, once it says so."""
    text = "metrics are at port "
    worker.wait_for_log(text)
    return Endpoint(int(worker.log.partition(text)[2].partition(":")[0]))
