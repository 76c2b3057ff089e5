"""Soft shutdown: the time that `worker_soft_shutdown_timeout` gives to running tasks before a cold one ends them.

In: Celery's handlers of `SIGQUIT` and a second `SIGINT`. Out: a time until which the pool drains, and then what those
handlers wanted to do at once.

Celery sleeps through that time in the signal's handler, which does for child processes, and then stops the pool, still
in there. Here the tasks need the very thread that would sleep, and a handler may stand anywhere: in a task's own code,
or in the middle of a batch, where nothing can drain. So it only notes the time and goes on to its end, after which
Celery ends its loop and terminates the pool, which drains first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any

from celery import Celery
from celery.worker import state

logger = logging.getLogger(__name__)

#: The consumer's method that a cold shutdown cancels the running tasks with: Celery 5.6's name for it, and 5.5's.
CANCEL = ("cancel_active_requests", "cancel_all_unacked_requests")


class SoftShutdown:
    """One worker's. Lives on the main thread, and is called by its signal handlers."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._cancel: Callable[[], None] | None = None
        # Another signal came, perhaps while the first one's handler had hardly begun.
        self._is_over = False
        # How many handlers are on their way to `pool.stop()`.
        self._handlers = 0
        #: When it ends; in the past where there is none.
        self.until = -inf

    @property
    def has_begun(self) -> bool:
        """Whether the worker is to end soon: no task begins any more."""
        return state.should_terminate is not None and state.should_terminate is not False

    @property
    def until_if_begun(self) -> float:
        """When it ends, for someone who otherwise had no reason to end."""
        return self.until if self.has_begun else inf

    def meet(self, consumer: Any) -> None:
        """Have a worker's handlers, which are installed by now, come here."""
        consumer.controller.wait_for_soft_shutdown = self._begin
        name = next(name for name in CANCEL if hasattr(consumer, name))
        cancel = getattr(consumer, name)
        setattr(consumer, name, lambda: self._cancel_active(cancel))

    def is_called_by_handler(self) -> bool:
        """Whether this `pool.stop()` is the handler's own: the loop is yet to end, and the pool to be terminated."""
        if self._handlers:
            self._handlers -= 1
            return True
        return False

    def cancel_rest(self) -> None:
        """What the handler would have done after its sleep."""
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def _begin(self) -> None:
        """In place of `WorkController.wait_for_soft_shutdown` (celery.worker.worker, 5.5 to 5.7).

        `on_cold_shutdown` calls this first, and `pool.stop()` last (celery.apps.worker).
        """
        self._handlers += 1
        conf = self._app.conf
        timeout = conf.worker_soft_shutdown_timeout
        if timeout > 0 and not self._is_over and (state.active_requests or conf.worker_enable_soft_shutdown_on_idle):
            self.until = monotonic() + timeout
            logger.warning("Initiating Soft Shutdown, terminating in %s seconds", timeout)

    def _cancel_active(self, cancel: Callable[[], None]) -> None:
        """In place of the consumer's method in `CANCEL`: at once, unless a soft shutdown has just begun.

        Another signal ends it, also one whose handler runs inside the first one's, and then comes here before it.
        """
        if monotonic() < self.until and self._cancel is None:
            self._cancel = cancel
            return
        self.until, self._cancel, self._is_over = -inf, None, True
        cancel()
