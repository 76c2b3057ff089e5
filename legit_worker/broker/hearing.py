"""A Redis channel that knows its lists, and waits until one of them has a message.

In: the queues of its consumers. Out: bells at their lists, and whether it is time to look at the lists. If a server
refuses what this takes, kombu fetches the messages.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from kombu.transport import redis as stock
from redis.exceptions import ResponseError

from legit_worker.broker.bells import Bell
from legit_worker.broker.failover import FailedOverError
from legit_worker.broker.reserve import Source
from legit_worker.redis_errors import code_of, is_forbidden

logger = logging.getLogger(__name__)

#: The refusals that this process has logged.
refusals: set[str] = set()


class HearingChannel(stock.Channel):
    """The part of a reserving channel that waits. Lives on its connection's thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bells: dict[str, Bell] = {}
        #: Lists that had a message. A list of a lower priority gets a bell once it has had one.
        self._seen: set[str] = set()
        #: Queues whose consumer doesn't ack.
        self._no_ack_queues: set[str] = set()
        #: Whether a list may have a message.
        self._looking = True
        #: Until then a server without memory lets no bell wait, and the script looks now and then.
        self._full_until = 0.0
        #: The server's refusal, after which kombu fetches the messages; None while the script reserves them.
        self.refusal: str | None = None
        super().__init__(*args, **kwargs)

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Remember the queues whose consumer doesn't ack. If there are no others, kombu fetches the messages."""
        (self._no_ack_queues.add if no_ack or not self.ack_emulation else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _update_queue_cycle(self) -> None:
        """Look at the lists again: a queue was added or cancelled."""
        super()._update_queue_cycle()
        self._looking = True

    def _sources(self) -> list[Source]:
        """Return the lists of all consumed queues, in the script's order."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        return [
            Source(queue, self.global_keyprefix + self._q_for_pri(queue, step), queue not in self._no_ack_queues)
            for step in self.priority_steps
            for queue in queues
        ]

    def _hang_bells(self) -> None:
        """Wait at the lists, unless the server has no memory for that."""
        if monotonic() < self._full_until:
            return
        sources = self._sources()
        queues = len(self.active_queues)
        self._seen.intersection_update(source.key for source in sources)
        wanted = {source.key for number, source in enumerate(sources) if number < queues or source.key in self._seen}
        for key in self._bells.keys() - wanted:
            self.drop(self._bells[key])
        for key in wanted:
            if key not in self._bells:
                connection = self.pool.connection_class(**self.pool.connection_kwargs)
                connection.connect()
                self._bells[key] = Bell(connection, key)
                self.connection.cycle.watch(self, self._bells[key])
            if self._bells[key].asked_at is None:
                self._bells[key].ask(self.patience())

    def on_bell(self, bell: Bell) -> None:
        """Look at the lists again: one has a message, or the lists without a bell are due for a look."""
        if bell.asked_at is None:  # the server closed this idle connection while the worker was busy
            self.drop(bell)
            return
        try:
            bell.answer()
        except FailedOverError as error:
            self.drop(bell)
            if not error.is_full:
                raise
            self._full_until = monotonic() + self.patience()
        except ResponseError as error:
            self._take_kombus_way(error)
        except self.connection_errors:
            self.drop(bell)
            raise
        self._looking = True

    def drop(self, bell: Bell) -> None:
        """Disconnect a bell. `_hang_bells` makes another if it needs one."""
        self._bells.pop(bell.key, None)
        self.connection.cycle.unwatch(bell)
        bell.connection.disconnect()

    def _drop_all(self) -> None:
        for bell in list(self._bells.values()):
            self.drop(bell)

    def patience(self) -> float:
        """Return the seconds that the server waits before it answers that the list is empty."""
        return float(getattr(self.connection, "brpop_timeout", 1)) or 1.0  # kombu 5.5 has none

    def _take_kombus_way(self, error: ResponseError) -> None:
        """Let kombu fetch the messages if this server refuses the script. Raises any other error again.

        A queue that is no list ends kombu's way as it ends a stock worker.
        """
        if not is_forbidden(error) and code_of(error) != "WRONGTYPE":
            raise error
        text = str(error)
        self.refusal = text
        if text not in refusals:
            refusals.add(text)
            logger.warning(
                "the Redis server does not let this worker reserve messages (%s): the worker fetches them one at a "
                "time, and if it is killed, a message on its way to it is lost, as with any Celery worker. To reserve "
                "messages, take Redis 6.2 or later, and a user who may run SCRIPT LOAD, EVALSHA and BLMOVE, "
                "and may use keys that begin with legit., which nobody else writes.",
                text,
            )
        self._drop_all()
