"""How envelopes reach servers that may be away, while the other servers' envelopes go on.

In: deliveries, from any thread. Out: `Delivery.done`, as soon as a server has the envelope. Each server has a lane.
What a lane can't deliver goes to the dead letters, `legit.dead.<app>` on the broker.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from concurrent import futures
from dataclasses import replace
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary, ref

from celery import Celery

from legit_worker import parking
from legit_worker.routing.delivery import Delivery
from legit_worker.routing.formats import queue_of
from legit_worker.routing.lane import Lane
from legit_worker.routing.letters import dead_queue, sealed
from legit_worker.routing.wires import open_wire
from legit_worker.settings import AppSettings

logger = logging.getLogger(__name__)

#: The most names of unknown apps that the log shows.
MAX_NAMES = 100

#: Seconds that a process without other work (prefork, threads, stock solo) waits for a server that answered before.
BLOCKING_PATIENCE = 5.0

#: Seconds between two looks of such a process whether the queue is full.
LOOK_SECONDS = 0.1


class Lanes:
    """All lanes of one process, and the counts of its deliveries. A forked child starts over: it has no threads."""

    def __init__(self, app: Celery) -> None:
        self._app_ref = ref(app)
        self._process = 0
        self._start_over()

    def __repr__(self) -> str:
        return f"<Lanes: {list(self._lanes.values())}>"

    def send(self, delivery: Delivery) -> None:
        """Send, and return when the app's server has the envelope, or the broker as a dead letter. Parks if it can."""
        lane = self._lane(delivery.chosen.url)
        lane.add(delivery)
        if not parking.park(delivery.done, "its result to be routed"):
            self._block(lane, delivery)

    def _block(self, lane: Lane, delivery: Delivery) -> None:
        """Block until a server has the envelope. If the app's own doesn't take it soon, it becomes a dead letter."""
        end = monotonic() + (0.0 if lane.is_down else BLOCKING_PATIENCE)
        while monotonic() < end and not lane.holds(delivery.queue) and not delivery.done.done():
            futures.wait([delivery.done], timeout=LOOK_SECONDS)
        if not delivery.done.done():
            lane.give_up(delivery)
        delivery.done.result()

    def count(self, app: str, outcome: str) -> None:
        """Count an outcome for `report`."""
        self._counts.setdefault(app, Counter())[outcome] += 1

    def count_unknown(self, app: str) -> bool:
        """Count a task whose app is not configured. Returns whether the log should name the app."""
        self._unknown += 1
        is_new = app not in self._unknown_names and len(self._unknown_names) < MAX_NAMES
        if is_new:
            self._unknown_names.add(app)
        return is_new

    def report(self) -> dict[str, Any]:
        """Return the counts. `unknown`: tasks whose app is not configured. `apps`: sent, failed, dead, waiting, by app.

        A routed failure counts in `sent` and in `failed`.
        """
        waiting: Counter[str] = sum((lane.waiting() for lane in self.all()), Counter())
        apps = {app: counts | {"waiting": waiting[app]} for app, counts in self.counts().items()}
        return {"unknown": self._unknown, "apps": apps}

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many were sent, failed and died, by app. Takes no lock."""
        names = ("sent", "failed", "dead")
        return {app: {name: counts[name] for name in names} for app, counts in list(self._counts.items())}

    def all(self) -> list[Lane]:
        """Return the lanes, and the lane of the dead letters."""
        return [*self._lanes.values(), *([self._cemetery] if self._cemetery else [])]

    @property
    def _app(self) -> Celery:
        app = self._app_ref()
        assert app is not None, "the backend that asks keeps its app"
        return app

    def _lane(self, url: str | None) -> Lane:
        if self._process != os.getpid():
            self._start_over()
        with self._lock:
            if url not in self._lanes:
                wire = open_wire(self._app, url)
                is_brokers = wire.name == self._app.connection_for_write().as_uri()
                self._lanes[url] = Lane(wire, self._bury, is_brokers=is_brokers)
            return self._lanes[url]

    def _start_over(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._lanes: dict[str | None, Lane] = {}
        self._cemetery: Lane | None = None
        self._counts: dict[str, Counter[str]] = {}
        self._unknown = 0
        self._unknown_names: set[str] = set()

    def _bury(self, delivery: Delivery, reason: str) -> None:
        """Make a delivery a dead letter. The broker keeps it; until it can, the task stays unacked."""
        logger.error(
            "the result of task %s for app %s goes to %s: %s. `celery legit dead replay %s` sends it again",
            delivery.task_id,
            delivery.app,
            dead_queue(delivery.app),
            reason,
            delivery.app,
        )
        with self._lock:
            if self._cemetery is None:
                self._cemetery = Lane(open_wire(self._app, None), None)
        self._cemetery.add(dead_letter(delivery, reason))
        self.count(delivery.app, "dead")


_lanes: WeakKeyDictionary[Celery, Lanes] = WeakKeyDictionary()
_lanes_lock = threading.Lock()


def is_any_down() -> bool:
    """Whether a server that gets results does not take them now."""
    return any(lane.is_down for lanes in list(_lanes.values()) for lane in lanes.all())


def is_broker_down() -> bool:
    """Whether the broker takes no envelopes now, so that none can become a dead letter."""
    return any(lane.is_down and lane.is_last for lanes in list(_lanes.values()) for lane in lanes.all())


def lanes_of(app: Celery) -> Lanes:
    """Return the lanes that all backends of one Celery app share."""
    with _lanes_lock:
        return _lanes.setdefault(app, Lanes(app))


def dead_letter(delivery: Delivery, reason: str) -> Delivery:
    """Return a delivery to the dead letters. It fulfils the same future."""
    chosen = delivery.chosen
    asked = None if delivery.queue == queue_of(delivery.app, chosen) else delivery.queue
    return replace(
        delivery,
        chosen=AppSettings(dead_max_length=chosen.dead_max_length, dead_max_seconds=chosen.dead_max_seconds),
        is_dead_letter=True,
        queue=dead_queue(delivery.app),
        envelope=sealed(delivery.envelope, queue=asked, reason=reason),
        deadline=None,
    )
