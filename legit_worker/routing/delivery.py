"""One envelope on its way, and what may become of it. Pure.

In: an envelope, and where it goes. Out: what a server gets.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from legit_worker.routing.formats import Message, Push, key_of, message, pushes
from legit_worker.settings import AppSettings


class AwayError(Exception):
    """The server does not answer, or can take nothing now. No delivery is at fault."""


class NotNowError(Exception):
    """The server takes other deliveries, and may take this one later."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a queue may hold. 0 sets no bound."""

    length: int = 0
    seconds: float = 0.0
    #: Whether the oldest entries go if there are too many; otherwise new ones wait.
    drops_oldest: bool = False

    def __bool__(self) -> bool:
        return bool(self.length or self.seconds)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments with which RabbitMQ declares such a queue."""
        found: dict[str, Any] = {}
        if self.length:
            found |= {"x-max-length": self.length}
            found |= {"x-overflow": "drop-head" if self.drops_oldest else "reject-publish"}
        return found | ({"x-message-ttl": int(1000 * self.seconds)} if self.seconds else {})


#: Nothing is bounded.
UNBOUND = Bound()


@dataclass(eq=False, kw_only=True)
class Delivery:
    """One envelope on its way."""

    app: str
    chosen: AppSettings
    queue: str
    task_id: str
    envelope: bytes
    #: Done as soon as the app's server has it, or the server of the dead letters.
    done: Future[None] = field(default_factory=Future)
    #: The time on the monotonic clock at which it becomes a dead letter; None keeps trying for ever.
    deadline: float | None = None
    is_dead_letter: bool = False

    @property
    def bound(self) -> Bound:
        """The bound of its queue."""
        chosen = self.chosen
        if self.is_dead_letter:
            return Bound(length=chosen.dead_max_length or 0, seconds=chosen.dead_max_seconds or 0.0, drops_oldest=True)
        return Bound(length=chosen.queue_max_length or 0, seconds=chosen.queue_max_seconds or 0.0)

    @property
    def key(self) -> str:
        """Its list in Redis."""
        return key_of(self.chosen, self.queue)

    def pushes(self) -> list[Push]:
        """Return the values for Redis."""
        return pushes(self.chosen, self.queue, self.task_id, self.envelope)

    def message(self) -> Message:
        """Return the message for any other broker."""
        return message(self.chosen, self.task_id, self.envelope)


#: What became of a delivery: None if the server has it; a `NotNowError`; or why the server refuses it.
Outcome = tuple[Delivery, Exception | None]
