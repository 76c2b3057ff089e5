"""How a channel waits for a Redis list without taking from it.

In: empty lists. Out: a call to the channel as soon as a list has a message.
"""

from __future__ import annotations

import logging
import select
from time import monotonic
from typing import Any, Protocol

from kombu.transport import redis as stock

from legit_worker.broker.acks import flush_acks, settle

logger = logging.getLogger(__name__)


class Bell:
    """Rings when a list has a message, and leaves the message there. Owns one connection to the server.

    Redis has no command that waits without taking. So this one moves the last element to where it was.
    """

    def __init__(self, connection: Any, key: str) -> None:
        self.connection = connection
        self.key = key
        self.asked_at: float | None = None

    def fileno(self) -> int:
        """Return the descriptor that the poller watches."""
        return int(self.connection._sock.fileno())

    def ask(self, timeout: float) -> None:
        """Ask the server to answer when the list is not empty, or after `timeout` seconds."""
        self.connection.send_command("BLMOVE", self.key, self.key, "RIGHT", "RIGHT", timeout)
        self.asked_at = monotonic()

    def answer(self) -> None:
        """Read the server's answer, and forget it."""
        self.asked_at = None
        self.connection.read_response(disable_decoding=True)


class Hearer(Protocol):
    """A channel that hangs bells."""

    active_queues: set[str]
    health_check_interval: float | None
    qos: Any

    def on_bell(self, bell: Bell) -> None:
        """Look at the lists again: a bell has rung."""

    def drop(self, bell: Bell) -> None:
        """Disconnect a bell."""

    def patience(self) -> float:
        """Return the seconds that the server waits before it answers that the list is empty."""


class BellPoller(stock.MultiChannelPoller):
    """kombu's poller, which polls bells too. It hears a bell even while the prefetch count is used up."""

    def __init__(self) -> None:
        super().__init__()
        self.hub: Any = None
        self._bells: dict[int, tuple[Hearer, Bell]] = {}

    @property
    def fds(self) -> dict[int, Any]:
        """What this polls, by file descriptor."""
        return {**super().fds, **self._bells}

    def on_poll_start(self) -> None:
        """Ask for messages and send the acks: the hub is about to wait."""
        settle()
        for channel in list(self._channels):
            channel.deliver_rest()
        is_paused = bool(getattr(self, "_paused_brpop", False))  # kombu 5.7 pauses while the prefetch count is used up
        super().on_poll_start()
        flush_acks(may_wait=not is_paused)

    def watch(self, channel: Hearer, bell: Bell) -> None:
        """Poll a bell that is connected."""
        self._bells[bell.fileno()] = channel, bell
        self.poller.register(bell.fileno(), self.eventflags)

    def unwatch(self, bell: Bell) -> None:
        """Stop polling a bell."""
        for fileno, (_, watched) in list(self._bells.items()):
            if watched is bell:
                del self._bells[fileno]
                if self.hub is not None:
                    self.hub.remove(fileno)
                else:
                    self.poller.unregister(fileno)

    def on_readable(self, fileno: int) -> Any:
        """Hear a bell and ask for its messages, or read what kombu awaits."""
        if fileno in self._bells:
            channel, bell = self._bells[fileno]
            channel.on_bell(bell)
            if channel.active_queues and channel.qos.can_consume():  # else a batch might come before the question
                self._register_BRPOP(channel)
            return None
        return super().on_readable(fileno)

    def handle_event(self, fileno: int, event: int) -> Any:
        """Do the same without an event loop. A bell delivers no message, so the caller goes on waiting."""
        if fileno in self._bells:
            return self.on_readable(fileno)
        return super().handle_event(fileno, event)

    def maybe_check_brpop_health(self) -> None:
        """Drop connections on which an answer is overdue. kombu 5.7 calls this from time to time."""
        getattr(super(), "maybe_check_brpop_health", lambda: None)()  # kombu 5.5 has none
        for channel, bell in list(self._bells.values()):
            patience = channel.patience() + (channel.health_check_interval or 0)
            is_overdue = bell.asked_at is not None and monotonic() - bell.asked_at > patience
            if is_overdue and not _is_readable(bell):  # an answer that came while the worker computed is unread
                logger.warning("Redis gave no answer for %.0f seconds; connecting anew", patience)
                channel.drop(bell)


def _is_readable(file: Any) -> bool:
    """Tell whether it has something to read now. `select.select` refuses descriptors from 1,024 on."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(0))
