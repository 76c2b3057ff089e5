"""Counts tasks where every pool of Celery has them: in the requests of the worker's main process.

In: Celery's class of requests (celery.worker.request, 5.5 to 5.7), and what happens to each request. Out: counts and
seconds, by task and app. A prefork pool's children are counted too, since their parent hears of each end.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from celery import Celery, signals
from celery.worker import strategy

from legit_worker.apps import identify
from legit_worker.batching.histogram import SECONDS, Histogram
from legit_worker.broker.poison import deliveries_of
from legit_worker.metrics.catalogue import OTHER, Sample
from legit_worker.settings import Settings

#: The state of a task by the event that Celery tells of its end, told or not.
STATES = {
    "task-failed": "failed",
    "task-retried": "retried",
    "task-revoked": "revoked",
    "task-rejected": "rejected",
    "task-cancelled": "cancelled",
}

#: The states of tasks whose seconds are counted.
RAN = ("succeeded", "failed")


class Tally:
    """One worker's. The main thread counts; so may the threads of a threads pool. Any thread may read."""

    def __init__(self, chosen: Settings, here: Callable[[], tuple[str, float] | None]) -> None:
        """`here` gives the app of the task that runs here, and the seconds that it was parked; None if none runs."""
        self._chosen = chosen
        self._here = here
        # Among those who count. Whoever reads takes none.
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[tuple[str, ...]]] = {
            name: Counter() for name in ("messages_received_total", "messages_redelivered_total", "tasks_total")
        }
        self._seconds: dict[str, dict[tuple[str, ...], Histogram]] = {
            name: {} for name in ("task_queue_seconds", "task_wait_seconds", "task_seconds")
        }

    def received(self, task: str, is_redelivered: bool) -> None:
        """A message came."""
        with self._lock:
            self._counts["messages_received_total"][(task,)] += 1
            if is_redelivered:
                self._counts["messages_redelivered_total"][(task,)] += 1

    def unknown(self) -> None:
        """A message came whose task this worker does not have."""
        with self._lock:
            self._counts["tasks_total"][(OTHER, OTHER, "unknown")] += 1

    def began(self, task: str, request: Any, seconds: float) -> None:
        """A task began, this long after its message came."""
        label = (task, self._here_or_asked(request)[0])
        with self._lock:
            self._observe("task_queue_seconds", label, seconds)

    def ended(self, task: str, state: str, request: Any, seconds: float | None) -> None:
        """A task ended, this long after its message came; None if that says nothing."""
        app, waited = self._here_or_asked(request)
        with self._lock:
            self._counts["tasks_total"][(task, app, state)] += 1
            if seconds is None or state not in RAN:
                return
            self._observe("task_seconds", (task, app), seconds)
            if waited is not None:
                self._observe("task_wait_seconds", (task, app), waited)

    def samples(self) -> Iterator[Sample]:
        """All of it."""
        for name, counts in self._counts.items():
            yield from ((name, labels, count) for labels, count in list(counts.items()))
        for name, histograms in self._seconds.items():
            yield from ((name, labels, histogram) for labels, histogram in list(histograms.items()))

    def _observe(self, name: str, labels: tuple[str, str], seconds: float) -> None:
        histograms = self._seconds[name]
        histogram = histograms.get(labels)
        if histogram is None:
            histogram = histograms[labels] = Histogram(SECONDS)
        histogram.observe(seconds)

    def _here_or_asked(self, request: Any) -> tuple[str, float | None]:
        """The app that a task is for, if the settings have it, and the seconds that the task was parked."""
        here = self._here()
        if here is not None:
            return here[0] or OTHER, here[1]
        app = identify(self._chosen, request.request_dict)
        return (app if app in self._chosen.apps else OTHER) or OTHER, None


def count_requests(app: Celery, tally: Tally) -> Callable[[], None]:
    """Have all requests counted that this process makes from now on. Returns a function that undoes this."""
    create = strategy.create_request_cls

    def create_counted(*args: Any, **options: Any) -> Any:
        return counted(create(*args, **options), tally)

    def note_unknown(sender: Any = None, **_: Any) -> None:
        tally.unknown()

    strategy.create_request_cls = create_counted
    signals.task_unknown.connect(note_unknown, weak=False)

    def undo() -> None:
        strategy.create_request_cls = create
        signals.task_unknown.disconnect(note_unknown)

    return undo


def counted(wrapped: Any, tally: Tally) -> Any:
    """Return a subclass of a class of requests, which counts them."""
    return type("Counted", (Counting, wrapped), {"tally": tally})


class Counting:
    """Mixed into a class of requests. Counts each message once as it comes, and once as its task ends."""

    tally: Tally
    #: Celery's. Its `name` may be one that the message chose.
    task: Any
    eta: Any

    def __init__(self, message: Any, *args: Any, **options: Any) -> None:
        super().__init__(message, *args, **options)  # type: ignore[call-arg]
        self.came, self.has_ended = monotonic(), False
        self.tally.received(self.task.name, deliveries_of(message) > 0)

    def on_accepted(self, pid: Any, time_accepted: float) -> Any:
        """Do as Celery does, and count the wait before the task."""
        if self.eta is None:
            self.tally.began(self.task.name, self, time_accepted - self.came)
        return super().on_accepted(pid, time_accepted)  # type: ignore[misc]

    def on_success(self, outcome: tuple[bool, Any, float], **options: Any) -> Any:
        """Do as Celery does, which tells of a failure by an event, and of an ignored task by nothing."""
        returned = super().on_success(outcome, **options)  # type: ignore[misc]
        self._end("ignored" if outcome[0] else "succeeded")
        return returned

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        """Do as Celery does, which tells of a hard limit by an event only since 5.7."""
        returned = super().on_timeout(soft, timeout)  # type: ignore[misc]
        if not soft:
            self._end("failed")
        return returned

    def send_event(self, type: str, **fields: Any) -> Any:
        """Do as Celery does, which calls this whether or not anybody wants events."""
        if type in STATES:
            self._end(STATES[type])
        return super().send_event(type, **fields)  # type: ignore[misc]

    def _end(self, state: str) -> None:
        if not self.has_ended:
            self.has_ended = True
            seconds = None if self.eta is not None else monotonic() - self.came
            self.tally.ended(self.task.name, state, self, seconds)
