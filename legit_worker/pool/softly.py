"""Soft shutdown: the time that `worker_soft_shutdown_timeout` gives to running tasks before a cold one ends them.

In: Celery's handlers of `SIGQUIT` and a second `SIGINT`. Out: a time until which the pool drains, and then what those
handlers wanted to do at once.

Celery sleeps through that time in the signal's handler, which does for child processes. Here the tasks need the very
thread that would sleep. So the handler only notes the time and goes on to its end, after which Celery ends its loop and
terminates the pool, which drains first.
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

#: What a consumer calls it to cancel all that runs: since Celery 5.6, and in 5.5.
CANCEL = ("cancel_active_requests", "cancel_all_unacked_requests")


class SoftShutdown:
    """One worker's. Lives on the main thread, and is called by its signal handlers."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._cancel: Callable[[], None] | None = None
        #: When it ends; in the past where there is none.
        self.until = -inf

    @property
    def until_if_begun(self) -> float:
        """When it ends, for someone who otherwise had no reason to end."""
        return self.until if state.should_terminate is not None and state.should_terminate is not False else inf

    def meet(self, consumer: Any) -> None:
        """Have a worker's handlers, which are installed by now, come here."""
        consumer.controller.wait_for_soft_shutdown = self._begin
        name = next(name for name in CANCEL if hasattr(consumer, name))
        cancel = getattr(consumer, name)
        setattr(consumer, name, lambda: self._cancel_active(cancel))

    def cancel_rest(self) -> None:
        """What the handler would have done after its sleep."""
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def _begin(self) -> None:
        """In place of `WorkController.wait_for_soft_shutdown` (celery.worker.worker, 5.5 to 5.7)."""
        conf = self._app.conf
        timeout = conf.worker_soft_shutdown_timeout
        if timeout > 0 and (state.active_requests or conf.worker_enable_soft_shutdown_on_idle):
            logger.warning("Initiating Soft Shutdown, terminating in %s seconds", timeout)
            self.until = monotonic() + timeout

    def _cancel_active(self, cancel: Callable[[], None]) -> None:
        """In place of the consumer's method in `CANCEL`: at once, unless a soft shutdown has just begun. Another signal
        ends it."""
        if monotonic() < self.until and self._cancel is None:
            self._cancel = cancel
            return
        self.until, self._cancel = -inf, None
        cancel()
