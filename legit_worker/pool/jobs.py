"""What Celery hands to a pool for one task, and what the pool's fiber does with it.

In: the arguments of `apply_async`. Out: Celery's callbacks, when the task is accepted and when it is done.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import celery
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.app.task import Task
from celery.concurrency.base import apply_target
from celery.exceptions import Reject, WorkerLostError, WorkerShutdown, WorkerTerminate
from celery.worker import state
from greenlet import GreenletExit
from kombu.exceptions import OperationalError
from kombu.utils.encoding import safe_repr

from legit_worker.broker.redis import gave_up
from legit_worker.pool.bodies import in_body
from legit_worker.pool.fibers import Fiber, Phase, current
from legit_worker.pool.hooks import is_raised_by
from legit_worker.pool.limits import TimeLimitPassed
from legit_worker.pool.messages import is_gone
from legit_worker.pool.requests import ended_last, may_be_revoked, message_of, store_failure
from legit_worker.results.writes import is_away

logger = logging.getLogger(__name__)

#: What kombu's publishing says, as an `AttributeError`, if its channel was closed while it tried again (5.5 to 5.7).
CLOSED = "'NoneType' object has no attribute 'client'"

#: From this release on, `Request.on_failure` acks and stores nothing once a shutdown has begun.
STORES_NOTHING = (5, 6)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task, as `celery.worker.request.Request.execute_using_pool` (5.5 to 5.7) hands it over."""

    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]
    callback: Callable[[Any], Any]
    error_callback: Callable[[Any], Any]
    accept_callback: Callable[[int, float], Any] | None

    @property
    def task(self) -> str:
        """The task's name, `""` if the target is no task."""
        return self.args[0] if self.is_task else ""

    @property
    def name(self) -> str:
        """The task's name with its id."""
        return f"{self.args[0]}[{self.args[1]}]" if self.is_task else "a call"

    @property
    def headers(self) -> Mapping[str, Any]:
        """The task's request, empty if the target is no task."""
        return self.args[2] if self.is_task else {}

    @property
    def is_task(self) -> bool:
        """Whether these are the arguments of Celery's `trace_task_ret` (celery.app.trace, 5.5 to 5.7)."""
        return len(self.args) >= 3 and isinstance(self.args[2], Mapping)

    @property
    def request(self) -> Any:
        """Celery's `Request`, whose methods the callbacks are; None if the target is no task."""
        return getattr(self.callback, "__self__", None)

    def run(self, refuse: Callable[[], None] | None = None) -> None:
        """Run the task from its acceptance to its end, as `apply_target` does (celery.concurrency.base, 5.7).

        If there is a `refuse`, it runs in place of a task that can't begin. A task that ends by `sys.exit()`, a
        `KeyboardInterrupt` of its own, or a `MemoryError` fails. Celery would end the worker with it, as if a child
        process had died, and prefork's parent tells `Request.on_failure` of that.
        """
        fiber = _here()
        message = message_of(self.request)
        if message is not None and (is_gone(message) or gave_up(message)):
            logger.info("%s is another worker's by now, and does not begin here", self.name)
            state.task_ready(self.request)
            return
        if self._was_revoked():
            return
        if refuse is not None:
            refuse()
            return
        try:
            apply_target(
                self._call,
                self.args,
                dict(self.kwargs),
                self._tell,
                self.accept_callback,
                pid=fiber.pid,
                propagate=(GreenletExit,),
            )
        except TimeLimitPassed:
            limit, fiber.limit = fiber.limit, None
            if limit is not None and limit.hard is not None:
                limit.on_timeout(False, limit.hard)
        finally:
            fiber.holdings.end(fiber)

    def _was_revoked(self) -> bool:
        """Whether it expired or was revoked while it waited to begin, which Celery then tells.

        Celery has looked only as it came.
        """
        fiber, request = _here(), self.request
        if not may_be_revoked(request):
            return False
        phase, fiber.phase = fiber.phase, Phase.ENDING
        if request.revoked():
            return True
        fiber.phase = phase
        return False

    def refuse(self, error: Exception) -> None:
        """Fail a task that can't begin."""
        fiber = _here()
        fiber.phase = Phase.ENDING
        if self.accept_callback is not None:  # which acks, if the task is acked early
            self.accept_callback(fiber.pid, monotonic())
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """Fail the task with an error that is not its own code's: its failure is stored, told, and then acked."""
        failure = _raised(error)
        if self.request is not None and celery.VERSION[:2] >= STORES_NOTHING and state.should_terminate:
            store_failure(self.request, error, failure)
        self._tell(failure)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        fiber = _here()
        if isinstance(fiber.pending, GreenletExit):  # revoked as it was accepted
            fiber.raise_pending()
        if fiber.exclusive_depth:
            fiber.wait_to_be_alone()
        # Of a task, Celery's tracer says where its own code is.
        target = self.target if self.is_task else in_body(self.target)
        try:
            return target(*args, **kwargs)
        except Reject:  # from a handler of the task's end, which Celery's tracer lets through, as the next
            return ExceptionInfo()
        except MemoryError as error:
            return _as_lost(error)
        except Exception as error:
            # The failure is stored, told to the project's `on_failure` twice, and that raises.
            if is_raised_by(getattr(self.request, "task", None), error):
                logger.exception("the hooks of %s failed", self.name)
                return (1, ExceptionInfo(), 0.0)
            raise
        except (GreenletExit, WorkerShutdown, WorkerTerminate):
            raise
        except BaseException as error:
            return _as_lost(error)

    def _tell(self, result: Any) -> Any:
        if isinstance(result, ExceptionInfo):
            with ended_last(self.request):
                return self.error_callback(result)
        return self.callback(_seen_to(result))


def _here() -> Fiber:
    fiber = current()
    assert fiber is not None
    return fiber


def _seen_to(result: Any) -> Any:
    """What Celery's trace returns, in the form in which `Request.on_failure` does what is right.

    It would raise a `MemoryError` again, whose failure is stored. And it would drop a task that could not be sent again
    since the broker is away: Celery rejects that, and it goes back to its queue instead.
    """
    match result:
        case (1, ExceptionInfo(exception=MemoryError() as error) as failure, _):
            failure.exception = RuntimeError(safe_repr(error))
        case (1, ExceptionInfo(exception=ExceptionWithTraceback(exc=Reject() as reject)), _):
            if _is_unsent_retry(reject):
                logger.warning("a task could not be sent again, and goes back to its queue: %r", reject.reason)
                reject.requeue = True
    return result


def _is_unsent_retry(reject: Reject) -> bool:
    """Whether `Task.retry` raised it (celery.app.task, 5.5 to 5.7), and not the task."""
    frames = (frame for frame, _ in traceback.walk_tb(reject.__traceback__))
    is_away_now = isinstance(reject.reason, OperationalError | OSError) or is_away(reject.reason)
    is_away_now = is_away_now or (isinstance(reject.reason, AttributeError) and str(reject.reason) == CLOSED)
    return is_away_now and any(frame.f_code is Task.retry.__code__ for frame in frames)


def _as_lost(error: BaseException) -> ExceptionInfo:
    """Celery's word for a task that took its process with it, which is stored as its failure."""
    lost = WorkerLostError(safe_repr(error))
    lost.__cause__ = error
    return _raised(lost)


def _raised(error: Exception) -> ExceptionInfo:
    try:
        raise error
    except Exception:
        return ExceptionInfo()
