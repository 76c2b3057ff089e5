"""Tasks that have begun go on while the broker can't be reached.

Celery waits on the main thread between two tries to connect, up to 30 s, and the hub does not come round.

In: kombu's word before each second of such a wait. Out: turns of the loop.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from legit_worker.errors import DeviceLostError
from legit_worker.pool import fibers
from legit_worker.pool.engine import Engine
from legit_worker.pool.loop import Loop

logger = logging.getLogger(__name__)

#: Seconds that tasks go on before kombu's next second of sleep, or its next try: the broker may be back.
MOST_SECONDS = 5.0

#: Seconds between two looks at a batch that is in flight.
LOOK = 0.05


class Outage:
    """One pool's. Lives on the main thread."""

    def __init__(self, loop: Loop, engine: Engine, give_up: Callable[[DeviceLostError], None]) -> None:
        self._loop = loop
        self._engine = engine
        self._give_up = give_up

    def meet(self, consumer: Any) -> None:
        """Have a worker's tries to connect advance its tasks (celery.worker.consumer, 5.5 to 5.7)."""
        connect = consumer.ensure_connected

        def ensure_connected(connection: Any) -> Any:
            connection.ensure_connection = self._advancing(connection.ensure_connection)
            try:
                return connect(connection)
            finally:
                del connection.ensure_connection

        consumer.ensure_connected = ensure_connected

    def _advancing(self, ensure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(ensure)
        def ensure_connection(*args: Any, callback: Callable[[], Any] = lambda: None, **options: Any) -> Any:
            def before_each_second() -> None:
                callback()  # which may end the worker
                self._advance()

            return ensure(*args, callback=before_each_second, **options)

        return ensure_connection

    def _advance(self) -> None:
        """Advance all that can be by now."""
        if self._loop.is_turning or fibers.current() is not None:
            return
        until = monotonic() + MOST_SECONDS
        try:
            while (self._loop.has_work or self._engine.is_busy) and monotonic() < until:
                self._loop.turn(lambda: True)
                if not self._loop.has_work and self._engine.is_busy:
                    self._loop.wait(LOOK)
        except DeviceLostError as error:
            self._give_up(error)
        except Exception:  # Celery would take it for the error of this try
            logger.exception("a task ended badly while the broker was away")
