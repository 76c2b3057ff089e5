"""The way to one server: envelopes wait here until the server has them.

In: deliveries, from any thread. Out: `Delivery.done`, as soon as the server has the envelope. A delivery that the
server refuses, or that is not made in time, is undeliverable. The lane of the dead letters has no such way out: there,
each delivery waits until it is made.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from time import monotonic

from cachetools import TTLCache

from legit_worker.routing.delivery import AwayError, Delivery, NotNowError
from legit_worker.routing.waiting import FIRST_RETRY, LAST_RETRY, Waiting
from legit_worker.routing.wires import KNOWN_QUEUES, Wire

logger = logging.getLogger(__name__)

#: The most bytes of envelopes that wait for one server. Further envelopes go to the dead letters at once.
MAX_WAITING_BYTES = 64 * 2**20

#: The most envelopes that wait for one server. Each keeps its task unacked, and its fiber in memory.
MAX_WAITING = 5000

#: Seconds before the log says again that a queue takes nothing.
SAID_SECONDS = 60.0


class Lane:
    """The way to one server. Any thread may call its public methods; the lane's own thread sends.

    A thread that dies is started again, and goes on with what waits.
    """

    def __init__(
        self, wire: Wire, undeliverable: Callable[[Delivery, str], None] | None, *, is_brokers: bool = False
    ) -> None:
        """`is_brokers`: the dead letters are on this lane's server, too. So they are no way out when it is away."""
        self.name = wire.name
        self._wire = wire
        self._undeliverable = undeliverable
        self._is_brokers = is_brokers
        self._waiting = Waiting()
        self._said: TTLCache[str, bool] = TTLCache(KNOWN_QUEUES, SAID_SECONDS)
        self._changed = threading.Condition()
        self._pause = 0.0
        #: Whether the server did not answer the last try, or could take nothing.
        self.is_down = False
        self._thread = self._started()

    def __repr__(self) -> str:
        return f"<Lane {self.name}: {self._waiting.count} waiting{', server away' if self.is_down else ''}>"

    @property
    def is_last(self) -> bool:
        """Whether what it can't send can't become a dead letter either."""
        return self._undeliverable is None or self._is_brokers

    def add(self, delivery: Delivery) -> None:
        """Queue a delivery. If too much waits already, it is a dead letter."""
        with self._changed:
            reason = self._full(delivery)
            if not reason:
                self._waiting.put(delivery)
                self._changed.notify()
            if not self._thread.is_alive():
                self._thread = self._started()
        if reason:
            self._bury(delivery, reason)

    def give_up(self, delivery: Delivery) -> None:
        """Make a delivery a dead letter if it still waits here, and dead letters go to another server."""
        if self._undeliverable is None or (self._is_brokers and self.is_down):
            return
        with self._changed:
            is_here = self._waiting.remove(delivery)
        if is_here:
            self._bury(delivery, "its server does not answer, or its queue takes nothing")

    def holds(self, queue: str) -> bool:
        """Tell whether a queue takes nothing now, though its server answers."""
        with self._changed:
            return self._waiting.is_held(queue)

    def waiting(self) -> Counter[str]:
        """Count the waiting deliveries, by app."""
        with self._changed:
            return Counter(delivery.app for delivery in self._waiting)

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=f"legit_worker lane {self.name}", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        while True:
            with suppress(BaseException):  # whatever it is, what waits here must go on
                self._survive_turn()

    def _survive_turn(self) -> None:
        try:
            self._turn()
        except BaseException as error:
            logger.exception("the lane to %s failed, and goes on", self.name)
            self._server_is_away(error)

    def _turn(self) -> None:
        """Send one group. Waits until there is one."""
        group = self._next_group()
        try:
            self._send(group)
        except AwayError as error:
            self._server_is_away(error)
        else:
            self._pause = 0.0
            if self.is_down:
                self.is_down = False
                logger.warning("results go to %s again", self.name)

    def _next_group(self) -> list[Delivery]:
        with self._changed:
            while True:
                pause = self._waiting.release(monotonic())
                if group := self._waiting.group(self._wire.group_size):
                    return group
                self._changed.wait(pause)

    def _send(self, group: list[Delivery]) -> None:
        left = dict.fromkeys(group)
        try:
            for delivery, error in self._wire.send(group):
                del left[delivery]
                self._settle(delivery, error)
        except AwayError:
            raise
        except Exception as error:
            self._wire.close()
            for delivery in left:
                if len(left) > 1:
                    self._send([delivery])
                else:
                    self._refused(delivery, error)

    def _settle(self, delivery: Delivery, error: Exception | None) -> None:
        """Do what one delivery's outcome asks for."""
        if isinstance(error, NotNowError):
            self._hold(delivery.queue, error)
        elif error is not None:
            self._refused(delivery, error)
        else:
            with self._changed:
                self._waiting.remove(delivery)
                self._waiting.go_on(delivery.queue)
            tell(delivery.done)

    def _refused(self, delivery: Delivery, error: Exception) -> None:
        """Make a delivery a dead letter: its server answers, and refuses it. A dead letter waits for better times."""
        if self._undeliverable is None:
            self._hold(delivery.queue, error, delivery)
            return
        with self._changed:
            is_here = self._waiting.remove(delivery)
        if is_here:
            self._bury(delivery, f"its server refuses it: {type(error).__name__}: {error}")

    def _hold(self, queue: str, error: Exception, last: Delivery | None = None) -> None:
        """Try a queue's deliveries later. Other queues of the same server go on."""
        self._say(queue, error)
        with self._changed:
            held = self._waiting.hold(queue, monotonic(), last)
        self._bury_overdue(held, f"its queue did not take it in time: {error}")

    def _say(self, queue: str, error: Exception) -> None:
        """Log that a queue takes nothing. A full one with a slow consumer would fill the log."""
        if queue not in self._said:
            self._said[queue] = True
            logger.warning("queue %s at %s takes nothing now, and its results wait: %s", queue, self.name, error)

    def _server_is_away(self, error: BaseException) -> None:
        """Wait a little."""
        self._wire.close()
        if self._pause == 0.0:  # the idle connection may be stale: try a new one at once
            self._pause = FIRST_RETRY / 2
            return
        if not self.is_down:
            self.is_down = True
            logger.warning("%s can't be reached, or takes nothing now, and its results wait: %s", self.name, error)
        if not self._is_brokers:
            self._bury_overdue(self._waiting, f"its server did not take it in time: {error}")
        self._pause = min(self._pause * 2, LAST_RETRY)
        threading.Event().wait(self._pause)

    def _bury_overdue(self, deliveries: Iterable[Delivery], reason: str) -> None:
        if self._undeliverable is None:
            return
        with self._changed:
            now = monotonic()
            overdue = [item for item in deliveries if item.deadline is not None and item.deadline <= now]
            for delivery in overdue:
                self._waiting.remove(delivery)
        for delivery in overdue:
            self._bury(delivery, reason)

    def _bury(self, delivery: Delivery, reason: str) -> None:
        """Hand an undeliverable delivery on. If that fails, it waits here again."""
        assert self._undeliverable is not None, "the lane of the dead letters keeps what it has"
        try:
            self._undeliverable(delivery, reason)
        except Exception:
            logger.exception("the result of task %s can't become a dead letter, and waits", delivery.task_id)
            with self._changed:
                self._waiting.put(delivery)
                self._changed.notify()

    def _full(self, delivery: Delivery) -> str:
        """Say why a delivery may not wait here, under the lock; empty if it may."""
        if self._undeliverable is None or (self._is_brokers and self.is_down):
            return ""
        if self._waiting.bytes + len(delivery.envelope) > MAX_WAITING_BYTES:
            return f"over {MAX_WAITING_BYTES} bytes wait for the same server"
        return f"{MAX_WAITING} results wait for the same server" if self._waiting.count >= MAX_WAITING else ""


def tell(done: Future[None]) -> None:
    """Fulfil a future. Two lanes may have the same one: a delivery and its dead letter share it."""
    with suppress(InvalidStateError):
        done.set_result(None)
