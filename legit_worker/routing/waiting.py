"""What waits in a lane: ready to be sent, or held because its queue takes nothing for a while. Pure, and not locked.

In: deliveries, and queues to hold. Out: the next group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from legit_worker.routing.delivery import Delivery

#: Seconds before a lane tries a server, or a queue, again: the first pause, and the longest.
FIRST_RETRY, LAST_RETRY = 0.1, 3.0


@dataclass(eq=False)
class Hold:
    """A queue that takes nothing for a while, though its server answers."""

    #: Seconds of the present pause.
    pause: float
    #: When the lane tries again, on the monotonic clock; None while it tries.
    until: float | None
    deliveries: dict[Delivery, None] = field(default_factory=dict)


class Waiting:
    """The deliveries of one lane."""

    def __init__(self) -> None:
        #: The deliveries that can be sent, oldest first.
        self._ready: dict[Delivery, None] = {}
        self._holds: dict[str, Hold] = {}
        self.count = self.bytes = 0

    def __repr__(self) -> str:
        return f"<Waiting: {self.count}, {len(self._ready)} of them ready>"

    def __iter__(self) -> Iterator[Delivery]:
        return chain(self._ready, *(hold.deliveries for hold in self._holds.values()))

    def put(self, delivery: Delivery) -> None:
        """Add a delivery, behind others of its queue."""
        hold = self._holds.get(delivery.queue)
        (self._ready if hold is None or hold.until is None else hold.deliveries)[delivery] = None
        self.count += 1
        self.bytes += len(delivery.envelope)

    def remove(self, delivery: Delivery) -> bool:
        """Remove a delivery. Returns whether it was here."""
        hold = self._holds.get(delivery.queue)
        for place in (self._ready, hold.deliveries if hold else {}):
            if delivery in place:
                del place[delivery]
                self.count -= 1
                self.bytes -= len(delivery.envelope)
                if place is self._ready:  # whose queue pauses no more, and may never be named again
                    self._holds.pop(delivery.queue, None)
                return True
        return False

    def group(self, size: int) -> list[Delivery]:
        """Return the oldest ready deliveries, which stay here."""
        return list(islice(self._ready, size))

    def release(self, now: float) -> float | None:
        """Let queues go on whose pause is over. Returns the seconds until the next one; None if there is none."""
        for queue, hold in list(self._holds.items()):
            if hold.until is not None and hold.until <= now:
                if not hold.deliveries:  # they became dead letters, and the queue may never be named again
                    del self._holds[queue]
                hold.until = None
                self._ready |= hold.deliveries
                hold.deliveries = {}
        return min((hold.until - now for hold in self._holds.values() if hold.until is not None), default=None)

    def hold(self, queue: str, now: float, last: Delivery | None = None) -> Iterable[Delivery]:
        """Let a queue's deliveries pause, longer each time. Returns them. `last` goes behind the others."""
        hold = self._holds.setdefault(queue, Hold(pause=FIRST_RETRY / 2, until=None))
        if hold.until is None:
            hold.pause = min(hold.pause * 2, LAST_RETRY)
            hold.until = now + hold.pause
        hold.deliveries |= {delivery: None for delivery in self._ready if delivery.queue == queue}
        for delivery in hold.deliveries:
            self._ready.pop(delivery, None)
        if last is not None and last in hold.deliveries:
            del hold.deliveries[last]
            hold.deliveries[last] = None
        return hold.deliveries

    def is_held(self, queue: str) -> bool:
        """Tell whether a queue's deliveries pause."""
        hold = self._holds.get(queue)
        return hold is not None and hold.until is not None

    def go_on(self, queue: str) -> None:
        """Forget that a queue took nothing."""
        hold = self._holds.pop(queue, None)
        if hold is not None:
            self._ready |= hold.deliveries
