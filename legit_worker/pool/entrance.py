"""From Celery's arguments to a fiber: whose task it is, how long it may take, and when it is acked.

In: what `apply_async` gets. Out: a fiber that has not begun.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from celery import Celery
from kombu import Message

from legit_worker import settings
from legit_worker.apps import identify
from legit_worker.broker.poison import DEAD, bury, deliveries_of
from legit_worker.errors import InvalidInputError, PoisonedMessageError, shown
from legit_worker.pool import limits
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.jobs import Job
from legit_worker.pool.limits import Limit
from legit_worker.pool.requests import message_of
from legit_worker.pool.strays import Strays

logger = logging.getLogger(__name__)


class Entrance:
    """One pool's. Lives on the main thread."""

    def __init__(
        self,
        app: Celery,
        chosen: settings.Settings,
        options: Mapping[str, Any],
        *,
        wake: Callable[[Fiber], None],
        is_inline: bool,
        strays: Strays,
    ) -> None:
        """`options` are those that the worker's command line gave to its pool. Bad limits there end the process."""
        self._app = app
        self._settings = chosen
        self._wake = wake
        self._is_inline = is_inline
        self._strays = strays
        try:
            #: The worker's own limits in seconds.
            self.soft = limits.seconds_of(options.get("soft_timeout"), "the worker's soft time limit")
            self.hard = limits.seconds_of(options.get("timeout"), "the worker's time limit")
        except InvalidInputError as error:
            raise SystemExit(f"legit_worker: {error}") from None

    def fiber(self, job: Job, soft: Any, hard: Any, on_timeout: Callable[[bool, float], None]) -> Fiber:
        """The fiber of a task, which fails at once if its message can't be run, or its limits are no numbers."""
        refuse: Callable[[], None] | None = None
        limit = None
        try:
            if job.is_task:
                _check_message(job)
            limit = self._limit(job, soft, hard, on_timeout)
        except InvalidInputError as error:
            refuse = functools.partial(job.refuse, error)
        message, task = message_of(job.request), self._app.tasks.get(job.task)
        if message is not None and (why := self._poisons(job, message)):
            refuse = functools.partial(self._refuse_poisoned, job, why)
        app = identify(self._settings, job.headers) or ""
        if app not in self._settings.apps:
            app = ""
        fiber = Fiber(
            functools.partial(job.run, refuse),
            app=app,
            name=job.name,
            request=job.request,
            acks_late=task is None or bool(task.acks_late),
            exclusive=self._is_inline or bool(app and not self._settings.apps[app].batching),
            wake=self._wake,
        )
        fiber.limit = limit
        fiber.max_wait = self._settings.max_wait_seconds or inf
        return fiber

    def _poisons(self, job: Job, message: Message) -> str:
        """Say what happened too often with a message; nothing if it may run."""
        most = self._settings.max_deliveries
        if 0 < most <= (deliveries := deliveries_of(message)):
            return f"was delivered {deliveries} times, and each time its worker died or lost it"
        if 0 < most <= (strays := self._strays.times(job.request)):
            return f"was run {strays} times, and each time a signal's handler raised in Celery's code around it"
        return ""

    def _refuse_poisoned(self, job: Job, why: str) -> None:
        """Fail a task whose message was delivered too often, and keep the message."""
        error = PoisonedMessageError(
            f"{job.name} {why}: it is not run again (LEGIT_WORKER_MAX_DELIVERIES={self._settings.max_deliveries}). "
            f"Its message is in {DEAD}: see `celery legit dead list`"
        )
        logger.error("%s", error)
        bury(job.request.message, str(error))
        job.refuse(error)
        self._strays.forget(job.request)

    def _limit(self, job: Job, soft: Any, hard: Any, on_timeout: Callable[[bool, float], None]) -> Limit | None:
        """This task's limits: its message's, its own, or the worker's. Raises `InvalidInputError`."""
        if soft is None and hard is None:
            soft, hard = self.soft, self.hard
        else:
            soft, hard = self._given(job, soft, hard)
        if not soft and not hard:
            return None
        tell = limits.timeout_callback(job.name, on_timeout, job.fail)
        return Limit(soft=soft, hard=hard, on_timeout=tell)

    def _given(self, job: Job, soft: Any, hard: Any) -> tuple[float | None, float | None]:
        header = job.headers.get("timelimit")
        source = f"in its message's header timelimit={header!r}" if header else "in its own options"
        soft = limits.seconds_of(soft, f"the soft time limit of {job.name}, {source},") or self.soft
        hard = limits.seconds_of(hard, f"the time limit of {job.name}, {source},") or self.hard
        return soft, hard


def _check_message(job: Job) -> None:
    """Raise `InvalidInputError` if no task can be called by this message.

    Celery stores no failure over `kwargs`, takes the keys of `args` that are an object, and stores no result of an id
    that is no text (celery.app.trace, celery.backends, 5.5 to 5.7).
    """
    task_id, args, kwargs = job.args[1], job.headers.get("args", ()), job.headers.get("kwargs", {})
    if not isinstance(task_id, str) or not task_id:
        raise InvalidInputError(f"the message's id is {shown(task_id)}: send a text that is not empty, such as a UUID")
    if not isinstance(args, list | tuple):
        raise InvalidInputError(
            f"the message's args must be a list, got {type(args).__name__}: send arguments that have names as kwargs"
        )
    if not isinstance(kwargs, Mapping):
        raise InvalidInputError(
            f"the message's kwargs must be an object, got {type(kwargs).__name__}: send {{}} if there are none"
        )
