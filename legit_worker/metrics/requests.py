"""Counts tasks where every pool of Celery has them: in the requests of the worker's main process.

In: Celery's class of requests (celery.worker.request, 5.5 to 5.7), and what happens to each request. Out: counts and
seconds, by task and app. A prefork pool's children are counted too, since their parent hears of each end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from celery import signals
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


class Cell:
    """What is counted of one task and one app."""

    __slots__ = ("queue", "states", "total", "wait")

    def __init__(self) -> None:
        self.states: dict[str, int] = {}
        self.queue, self.wait, self.total = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)


class OfTask:
    """What is counted of one task. A class of requests has its own, so that a request looks for nothing."""

    __slots__ = ("apps", "received", "redelivered")

    def __init__(self) -> None:
        self.received = self.redelivered = 0
        self.apps: dict[str, Cell] = {}


class Tally:
    """One worker's. The main thread counts, without a lock. In a threads pool several do, and may lose a count."""

    def __init__(self, chosen: Settings, here: Callable[[], tuple[str, float] | None]) -> None:
        """`here` gives the app of the task that runs here, and the seconds that it was parked; None if none runs."""
        self._chosen = chosen
        self._here = here
        self._tasks: dict[str, OfTask] = {}
        #: Messages whose task this worker does not have.
        self.unknown = 0

    def of_task(self, name: str) -> OfTask:
        """Return what is counted of a task that the project has."""
        return self._tasks.setdefault(name, OfTask())

    def ended(self, counts: OfTask, state: str, request: Counting) -> None:
        """A task ended."""
        here = self._here()
        app = self._asked(request) if here is None else here[0] or OTHER
        cell = counts.apps.get(app)
        if cell is None:
            cell = counts.apps[app] = Cell()
        cell.states[state] = cell.states.get(state, 0) + 1
        if state not in RAN or request.eta is not None:  # which came long before it was to begin
            return
        cell.total.observe(monotonic() - request.came)
        if request.began:
            cell.queue.observe(request.began - request.came)
        if here is not None:
            cell.wait.observe(here[1])

    def samples(self) -> Iterator[Sample]:
        """All of it."""
        if self.unknown:
            yield "tasks_total", (OTHER, OTHER, "unknown"), self.unknown
        for task, counts in list(self._tasks.items()):
            yield "messages_received_total", (task,), counts.received
            yield "messages_redelivered_total", (task,), counts.redelivered
            for app, cell in list(counts.apps.items()):
                yield from _of_cell(task, app, cell)

    def _asked(self, request: Any) -> str:
        """The app that a message names, if the settings have it."""
        app = identify(self._chosen, request.request_dict)
        return app if app is not None and app in self._chosen.apps else OTHER


def _of_cell(task: str, app: str, cell: Cell) -> Iterator[Sample]:
    yield from (("tasks_total", (task, app, state), count) for state, count in list(cell.states.items()))
    yield "task_queue_seconds", (task, app), cell.queue
    yield "task_seconds", (task, app), cell.total
    yield "task_wait_seconds", (task, app), cell.wait


def count_requests(tally: Tally) -> Callable[[], None]:
    """Have all requests counted that this process makes from now on. Returns a function that undoes this."""
    create = strategy.create_request_cls

    def create_counted(*args: Any, **options: Any) -> Any:
        made = create(*args, **options)
        return counted(made, tally, inspect.signature(create).bind(*args, **options).arguments["task"].name)

    def note_unknown(sender: Any = None, **_: Any) -> None:
        tally.unknown += 1

    strategy.create_request_cls = create_counted
    signals.task_unknown.connect(note_unknown, weak=False)

    def undo() -> None:
        strategy.create_request_cls = create
        signals.task_unknown.disconnect(note_unknown)

    return undo


def counted(wrapped: Any, tally: Tally, task: str) -> Any:
    """Return a subclass of one task's class of requests, which counts them."""
    return type("Counted", (Counting, wrapped), {"tally": tally, "counts": tally.of_task(task)})


class Counting:
    """Mixed into a class of requests. Counts each message once as it comes, and once as its task ends."""

    tally: Tally
    counts: OfTask
    eta: Any
    #: When the message came, and when its task began; 0 before that. Both by the monotonic clock.
    came = began = 0.0
    has_ended = False

    def __init__(self, message: Any, *args: Any, **options: Any) -> None:
        super().__init__(message, *args, **options)  # type: ignore[call-arg]
        self.came = monotonic()
        self.counts.received += 1
        if deliveries_of(message):
            self.counts.redelivered += 1

    def on_accepted(self, pid: Any, time_accepted: float) -> Any:
        """Do as Celery does."""
        self.began = time_accepted
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
            self.tally.ended(self.counts, state, self)
