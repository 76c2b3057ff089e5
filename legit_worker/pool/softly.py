"""Soft shutdown: `worker_soft_shutdown_timeout` gives running tasks time to finish before a cold shutdown ends them.

In: Celery's handlers of `SIGQUIT` and a second `SIGINT`. Out: a time until which the pool drains, and then the calls
that the handlers wanted to make at once.

Celery sleeps through this time in the signal's handler, and then stops the pool from there. That works for child
processes. Here the tasks need the thread that would sleep. The signal may arrive in a task's own code or in the middle
of a batch, and nothing can drain there. So the handler only notes the time, and returns. Celery then ends its loop and
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

#: The consumer's method by which a cold shutdown cancels running tasks: its name in Celery 5.6, and in 5.5.
CANCEL = ("cancel_active_requests", "cancel_all_unacked_requests")


def is_set(flag: Any) -> bool:
    """Whether one of Celery's flags that end a worker is set. An exit code may be 0."""
    return flag is not None and flag is not False


class SoftShutdown:
    """One worker's soft shutdown. Lives on the main thread; Celery's signal handlers call it."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._cancel: Callable[[], None] | None = None
        self._consumer: Any = None
        # Whether another signal has ended it, perhaps during the first signal's handler.
        self._is_over = False
        # The number of handlers that will call `pool.stop()`.
        self._handlers = 0
        #: The time at which it ends; in the past if there is none.
        self.until = -inf
        #: Whether tasks can unwind at the point at which a signal interrupted the code.
        self.may_cancel: Callable[[], bool] = lambda: True

    @property
    def has_begun(self) -> bool:
        """Whether the worker ends soon, so that no task begins any more."""
        return is_set(state.should_terminate)

    @property
    def until_if_begun(self) -> float:
        """The time at which it ends; never if it has not begun."""
        return self.until if self.has_begun else inf

    def meet(self, consumer: Any) -> None:
        """Redirect a worker's signal handlers, which are installed by now, to this object."""
        self._consumer = consumer
        consumer.controller.wait_for_soft_shutdown = self._begin
        name = next(name for name in CANCEL if hasattr(consumer, name))
        cancel = getattr(consumer, name)
        setattr(consumer, name, lambda: self._cancel_active(cancel))

    def is_called_by_handler(self) -> bool:
        """Tell whether a handler makes this call of `pool.stop()`, so that Celery still terminates the pool later."""
        if self._handlers:
            self._handlers -= 1
            return True
        return False

    def cancel_rest(self) -> None:
        """Cancel the tasks that are left, as the handler would have done after its sleep."""
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def _begin(self) -> None:
        """Begin, in place of `WorkController.wait_for_soft_shutdown` (celery.worker.worker, 5.5 to 5.7).

        `on_cold_shutdown` calls this first, and `pool.stop()` last (celery.apps.worker).
        """
        self._handlers += 1
        self._leave_consumers()
        conf = self._app.conf
        timeout = conf.worker_soft_shutdown_timeout
        if timeout > 0 and not self._is_over and (state.active_requests or conf.worker_enable_soft_shutdown_on_idle):
            self.until = monotonic() + timeout
            logger.warning("Initiating Soft Shutdown, terminating in %s seconds", timeout)

    def _leave_consumers(self) -> None:
        """Keep the handler, which goes on from here, from cancelling consumers on RabbitMQ.

        That waits for an answer. The signal may have interrupted the worker as it waits for another one, such as to a
        prefetch count. The handler would read both, and the worker would wait for its own until a heartbeat comes, or
        for ever. Celery cancels the consumers once more as it stops, at once.
        """
        tasks, connection = self._consumer.task_consumer, self._consumer.connection
        if tasks is not None and connection is not None and connection.transport.driver_type == "amqp":
            tasks.cancel = lambda: None

    def _cancel_active(self, cancel: Callable[[], None]) -> None:
        """Cancel the running tasks, in place of the consumer's method in `CANCEL`, or have a soft shutdown do it.

        A handler may stand in the middle of a batch, or of a decision about models. Tasks that unwind there would wait
        for the very code that they interrupted, so the pool cancels them as soon as that is over. A second signal ends
        a soft shutdown. Its handler may run inside the first signal's, and get here first.
        """
        if self._consumer.task_consumer is not None:
            vars(self._consumer.task_consumer).pop("cancel", None)  # what `_leave_consumers` put there
        is_second = self._cancel is not None
        self._cancel = cancel
        if is_second or monotonic() >= self.until:
            self.until, self._is_over = -inf, True
            if self.may_cancel():
                self.cancel_rest()
