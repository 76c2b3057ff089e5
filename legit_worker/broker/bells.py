"""How a channel waits for a Redis list without taking from it.

In: lists that are empty. Out: a word to the channel when one no longer is.
"""

from __future__ import annotations

import logging
import select
from time import monotonic
from typing import Any, Protocol

from kombu.transport import redis as stock

from legit_worker.broker.acks import flush_acks

logger = logging.getLogger(__name__)


class Bell:
    """Rings when a list has something in it, and leaves it there. One connection to the server.

    No command waits without taking. To move the last element to where it was comes to the same.
    """

    def __init__(self, connection: Any, key: str) -> None:
        self.connection = connection
        self.key = key
        self.asked_at: float | None = None

    def fileno(self) -> int:
        """What the poller watches."""
        return int(self.connection._sock.fileno())

    def ask(self, timeout: float) -> None:
        """Have the server answer when the list is not empty, or after `timeout` seconds."""
        self.connection.send_command("BLMOVE", self.key, self.key, "RIGHT", "RIGHT", timeout)
        self.asked_at = monotonic()

    def answer(self) -> None:
        """Read what the server said; what it is doesn't matter."""
        self.asked_at = None
        self.connection.read_response(disable_decoding=True)


class Hearer(Protocol):
    """A channel that hangs bells."""

    health_check_interval: float | None

    def on_bell(self, bell: Bell) -> None:
        """A bell has rung."""

    def drop(self, bell: Bell) -> None:
        """A bell's connection is of no more use."""

    def patience(self) -> float:
        """Seconds that the server waits before it says that there is nothing."""


class BellPoller(stock.MultiChannelPoller):
    """kombu's poller, which polls bells too. A bell is heard even while the prefetch count has no room."""

    def __init__(self) -> None:
        super().__init__()
        self.hub: Any = None
        self._bells: dict[int, tuple[Hearer, Bell]] = {}

    @property
    def fds(self) -> dict[int, Any]:
        """All that is polled, by file descriptor."""
        return {**super().fds, **self._bells}

    def on_poll_start(self) -> None:
        """The hub is about to wait."""
        flush_acks()
        super().on_poll_start()

    def watch(self, channel: Hearer, bell: Bell) -> None:
        """Begin to poll a bell that has just been connected."""
        self._bells[bell.fileno()] = channel, bell
        self.poller.register(bell.fileno(), self.eventflags)

    def unwatch(self, bell: Bell) -> None:
        """Stop polling one that is about to be disconnected."""
        for fileno, (_, watched) in list(self._bells.items()):
            if watched is bell:
                del self._bells[fileno]
                if self.hub is not None:
                    self.hub.remove(fileno)
                else:
                    self.poller.unregister(fileno)

    def on_readable(self, fileno: int) -> Any:
        """A bell's answer, or what kombu awaits."""
        if fileno in self._bells:
            channel, bell = self._bells[fileno]
            return channel.on_bell(bell)
        return super().on_readable(fileno)

    def handle_event(self, fileno: int, event: int) -> Any:
        """The same without an event loop. A bell delivers nothing, so whoever drains goes on waiting."""
        if fileno in self._bells:
            return self.on_readable(fileno)
        return super().handle_event(fileno, event)

    def maybe_check_brpop_health(self) -> None:
        """Called from time to time (kombu 5.7): drop connections on which an answer is overdue."""
        getattr(super(), "maybe_check_brpop_health", lambda: None)()
        for channel, bell in list(self._bells.values()):
            patience = channel.patience() + (channel.health_check_interval or 0)
            is_overdue = bell.asked_at is not None and monotonic() - bell.asked_at > patience
            if is_overdue and not _is_readable(bell):  # nor has it come while the worker computed
                logger.warning("Redis gave no answer for %.0f seconds; connecting anew", patience)
                channel.drop(bell)


def _is_readable(file: Any) -> bool:
    """Now. `select.select` takes no descriptor from 1,024 on."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(0))
