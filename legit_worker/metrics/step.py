"""The step of a worker's consumer by which metrics and health hear of the worker.

In: the consumer, as it is made, connects, loses its connection and ends. Out: a server that answers from the start on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from celery import bootsteps

from legit_worker import settings
from legit_worker.metrics.catalogue import Sample
from legit_worker.metrics.collector import Collector
from legit_worker.metrics.health import BEAT_SECONDS, Health, Held
from legit_worker.metrics.requests import Tally, count_requests
from legit_worker.metrics.server import Server


class Figures(Held, Protocol):
    """What metrics ask of a pool that has `figures`: `ModelPool` has. Any thread may ask."""

    def here(self) -> tuple[str, float] | None:
        """The app of the task that runs here, and the seconds that the task was parked; None if none runs here."""

    def samples(self) -> Iterator[Sample]:
        """All that metrics show of the pool."""


class MetricsStep(bootsteps.StartStopStep):
    """Lives on the main thread. Made before the pool starts, and started once the consumer has its tasks."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        chosen = settings.load_or_exit()
        assert chosen.metrics_port is not None
        figures: Figures | None = getattr(consumer.pool, "figures", None)
        self._health = Health(figures)
        self._beat: Any = None
        tally = Tally(chosen, figures.here if figures is not None else lambda: None)
        count_requests(tally)
        sources = [lambda: _of_worker(consumer, chosen), lambda: _of_health(self._health), tally.samples]
        self._server = Server(
            chosen.metrics_port, Collector(*sources, *([figures.samples] if figures is not None else [])), self._health
        )
        self._server.start()

    def start(self, consumer: Any) -> None:
        """The consumer takes tasks: at the worker's start, and after each lost connection."""
        self._health.connected()
        self._beat = consumer.timer.call_repeatedly(BEAT_SECONDS, self._health.turned)

    def stop(self, consumer: Any) -> None:
        """It takes none any more. While the worker ends, the loop still turns."""
        self._health.away()
        if self._beat is not None and not self._health.is_ending:
            self._beat.cancel()

    def close(self, consumer: Any) -> None:
        """The worker ends."""
        self._health.ending()

    def info(self, consumer: Any) -> dict[str, Any]:
        """Return what `celery inspect stats` shows."""
        return {"metrics": {"port": self._server.port}}


def _of_worker(consumer: Any, chosen: settings.Settings) -> Iterator[Sample]:
    import legit_worker

    kind = type(consumer.pool)
    pool = kind.__name__ if kind.__module__.startswith("legit_worker.") else kind.__module__.rpartition(".")[2]
    yield "info", (legit_worker.__version__, consumer.hostname, chosen.role, pool, chosen.device), 1


def _of_health(health: Health) -> Iterator[Sample]:
    yield "ready", (), int(health.ready().is_yes)
    yield "loop_age_seconds", (), health.age
