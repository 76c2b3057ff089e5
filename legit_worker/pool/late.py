"""Revokes that come too late: the task's own code is over, and only the delivery of its result is left.

In: Celery's requests. Out: the same, which ignore what would tell a second end of the task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.worker.request import Request

from legit_worker.pool.fibers import FiberPid, Phase

logger = logging.getLogger(__name__)


def ignore_late_revokes() -> Callable[[], None]:
    """Have a task that is over stay what it is. Returns what undoes this.

    `Request.terminate` and `Request.cancel` (celery.worker.request, 5.5 to 5.7) store REVOKED or RETRY whatever the
    pool makes of it.
    """
    terminate, cancel = Request.terminate, Request.cancel

    def terminate_in_time(request: Request, *args: Any, **options: Any) -> None:
        if not _is_over(request):
            terminate(request, *args, **options)

    def cancel_in_time(request: Request, *args: Any, **options: Any) -> None:
        if not _is_over(request):
            cancel(request, *args, **options)

    def undo() -> None:
        Request.terminate, Request.cancel = terminate, cancel

    Request.terminate, Request.cancel = terminate_in_time, cancel_in_time
    return undo


def _is_over(request: Request) -> bool:
    fiber = request.worker_pid.fiber if isinstance(request.worker_pid, FiberPid) else None
    is_over = fiber is not None and fiber.phase is Phase.ENDING
    if is_over:
        logger.warning("task %s[%s] is over but for its delivery: too late to revoke it", request.name, request.id)
    return is_over
