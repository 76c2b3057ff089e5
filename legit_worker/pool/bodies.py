"""Where a task's own code begins and ends inside Celery's trace of it.

In: the tracers that Celery builds. Out: the fiber's phase, so that a time limit or a revoke interrupts the task's code
alone, and never what Celery does before and after it.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

from legit_worker.pool import fibers
from legit_worker.pool.fibers import Fiber, Phase

logger = logging.getLogger(__name__)


def mark_body(tracer: Callable[..., Any]) -> Callable[..., Any]:
    """Have a tracer tell the fiber when the task's own code runs. Returns the tracer.

    The tracer is a closure (`celery.app.trace.build_tracer`, 5.5 to 5.7). It calls the task by its variable `fun`,
    whatever that is: `run`, a custom `__call__`, or the wrappers of `autoretry_for` and `pydantic`.
    """
    inner: Any = inspect.unwrap(tracer)  # Sentry, for example, wraps it
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    for name, is_last in (("task_before_start", False), ("fun", True)):
        cell = cells[name]
        if cell.cell_contents is not None:
            cell.cell_contents = in_body(cell.cell_contents, is_last=is_last)
    return tracer


def in_body(function: Callable[..., Any], *, is_last: bool = True) -> Callable[..., Any]:
    """The same function, which tells the fiber that it is the task's own code. After the last one the task is over."""

    def run(*args: Any, **kwargs: Any) -> Any:
        fiber = fibers.current()
        if fiber is None or not fiber.enter_body():
            return function(*args, **kwargs)
        is_over = True
        try:
            fiber.raise_pending()
            result = function(*args, **kwargs)
            is_over = is_last
            fiber.raise_if_too_late()  # the task may have caught what was to end it
        except BaseException as error:
            if error.__traceback__ is not None:  # this frame is not the task's; from Python 3.11 on, `raise` minds this
                error.__traceback__ = error.__traceback__.tb_next
            raise
        finally:
            _end_child(fiber)
            fiber.phase = Phase.ENDING if is_over else Phase.NEW  # before any call, at which a signal may be handled
            if is_over:
                fiber.own.end()
        return result

    return run


def _end_child(fiber: Fiber) -> None:
    """A child that a task forked must not go on as a second worker."""
    if fibers.is_in_child():
        logger.critical("a child that %s had forked came back into the worker, and is ended: use os._exit", fiber.name)
        os._exit(os.EX_SOFTWARE)
