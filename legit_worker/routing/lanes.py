"""How envelopes reach a server that may be away, while the other servers' envelopes go on.

In: deliveries, from any thread. Out: `Delivery.done`, as soon as a server has the envelope. Each server has a lane
with its own thread. A delivery that is not made in time goes to the dead letters, `legit.dead.<app>` on the broker.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary, ref

from celery import Celery

from legit_worker import parking
from legit_worker.routing.wires import Delivery, Wire, open_wire
from legit_worker.settings import AppSettings

logger = logging.getLogger(__name__)

#: Seconds before a lane tries a server again: the first pause, and the longest.
FIRST_RETRY, LAST_RETRY = 0.1, 3.0

#: The most names of unknown apps that the log shows.
MAX_NAMES = 100

#: The most bytes of envelopes that wait for one server. Further envelopes go to the dead letters at once.
MAX_WAITING_BYTES = 64 * 2**20

#: Seconds that a process without other work (prefork, threads, stock solo) waits for a server that answered before.
BLOCKING_PATIENCE = 5.0


class Lane:
    """The way to one server. Any thread may call its public methods; the lane's own thread sends."""

    def __init__(self, wire: Wire, undeliverable: Callable[[Delivery, str], None] | None) -> None:
        self.name = wire.name
        self._wire = wire
        self._undeliverable = undeliverable
        self._waiting: deque[Delivery] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        #: Whether the server did not answer the last try.
        self.is_down = False
        self._thread = threading.Thread(target=self._run, name=f"legit_worker lane {self.name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Lane {self.name}: {len(self._waiting)} waiting{', server away' if self.is_down else ''}>"

    def add(self, delivery: Delivery) -> None:
        """Queue a delivery. If too many bytes wait already, it is a dead letter."""
        with self._changed:
            fits = self._undeliverable is None or self._bytes + len(delivery.envelope) <= MAX_WAITING_BYTES
            if fits:
                self._waiting.append(delivery)
                self._bytes += len(delivery.envelope)
                self._changed.notify()
        if not fits and self._undeliverable:
            self._undeliverable(delivery, f"over {MAX_WAITING_BYTES} bytes wait for the same server")

    def give_up(self, delivery: Delivery) -> None:
        """Make a delivery a dead letter if it still waits here."""
        with self._changed:
            if self._undeliverable is None or delivery not in self._waiting:
                return
            self._remove([delivery])
        self._undeliverable(delivery, "its server does not answer")

    def waiting(self) -> Counter[str]:
        """Count the waiting deliveries, by app."""
        with self._changed:
            return Counter(delivery.app for delivery in self._waiting)

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                group = [self._waiting[index] for index in range(min(self._wire.group_size, len(self._waiting)))]
            try:
                self._send(group)
            except self._wire.away as error:
                pause = self._server_is_away(error, pause)
            else:
                pause = 0.0
                if self.is_down:
                    self.is_down = False
                    logger.warning("results go to %s again", self.name)

    def _send(self, group: list[Delivery]) -> None:
        try:
            self._wire.send(group)
        except self._wire.away:
            raise
        except Exception as error:
            self._wire.close()
            if len(group) > 1:
                for delivery in group:
                    self._send([delivery])
            else:
                self._refused(group[0], error)
        else:
            self._finish(group)

    def _finish(self, group: list[Delivery]) -> None:
        with self._changed:
            self._remove(group)
        for delivery in group:
            _tell(delivery.done)

    def _refused(self, delivery: Delivery, error: Exception) -> None:
        """Make a delivery a dead letter: its server answers, and refuses it."""
        if self._undeliverable is None:
            logger.error("the broker refuses dead letters of app %s, and they are lost: %s", delivery.app, error)
            self._finish([delivery])
            return
        with self._changed:
            self._remove([delivery])
        self._undeliverable(delivery, f"its server refuses it: {type(error).__name__}: {error}")

    def _server_is_away(self, error: Exception, pause: float) -> float:
        """Wait a little. Returns the seconds."""
        self._wire.close()
        if pause == 0.0:  # the idle connection may be stale: try a new one at once
            return FIRST_RETRY / 2
        if not self.is_down:
            self.is_down = True
            logger.warning("%s can't be reached, its results wait: %s: %s", self.name, type(error).__name__, error)
        self._bury_overdue()
        pause = min(pause * 2, LAST_RETRY)
        threading.Event().wait(pause)
        return pause

    def _bury_overdue(self) -> None:
        if self._undeliverable is None:
            return
        with self._changed:
            now = monotonic()
            overdue = [item for item in self._waiting if item.deadline is not None and item.deadline <= now]
            self._remove(overdue)
        for delivery in overdue:
            self._undeliverable(delivery, "its server did not answer in time")

    def _remove(self, gone: list[Delivery]) -> None:
        """Remove deliveries, under the lock. They come first, except any that were given up meanwhile."""
        known = {id(delivery) for delivery in gone}
        removed = []
        while self._waiting and id(self._waiting[0]) in known:
            removed.append(self._waiting.popleft())
        if len(removed) < len(known):
            removed += [delivery for delivery in self._waiting if id(delivery) in known]
            self._waiting = deque(delivery for delivery in self._waiting if id(delivery) not in known)
        self._bytes -= sum(len(delivery.envelope) for delivery in removed)


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
            patience = 0.0 if lane.is_down else BLOCKING_PATIENCE
            try:
                delivery.done.result(timeout=patience)
            except FutureTimeoutError:
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
        waiting: Counter[str] = sum((lane.waiting() for lane in list(self._lanes.values())), Counter())
        names = ("sent", "failed", "dead")
        apps = {
            app: {name: counts[name] for name in names} | {"waiting": waiting[app]}
            for app, counts in list(self._counts.items())
        }
        return {"unknown": self._unknown, "apps": apps}

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
                self._lanes[url] = Lane(wire, self._bury)
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
        """Make a delivery a dead letter. The broker keeps it: the task came from the broker, so that one answers."""
        logger.error(
            "the result of task %s for app %s goes to %s: %s. `celery legit results replay %s` sends it again",
            delivery.task_id,
            delivery.app,
            dead_queue(delivery.app),
            reason,
            delivery.app,
        )
        self.count(delivery.app, "dead")
        with self._lock:
            if self._cemetery is None:
                self._cemetery = Lane(open_wire(self._app, None), None)
        self._cemetery.add(dead_letter(delivery))


_lanes: WeakKeyDictionary[Celery, Lanes] = WeakKeyDictionary()
_lanes_lock = threading.Lock()


def lanes_of(app: Celery) -> Lanes:
    """Return the lanes that all backends of one Celery app share."""
    with _lanes_lock:
        return _lanes.setdefault(app, Lanes(app))


def dead_queue(app: str) -> str:
    """Return the queue of an app's dead letters."""
    return f"legit.dead.{app}"


def dead_letter(delivery: Delivery) -> Delivery:
    """Return a delivery of the bare envelope to the dead letters. It fulfils the same future."""
    return replace(delivery, chosen=AppSettings(), queue=dead_queue(delivery.app), deadline=None)


def _tell(done: Future[None]) -> None:
    if not done.done():
        done.set_result(None)
