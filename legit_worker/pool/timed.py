"""Tasks that one of the hub's timers starts: those with an ETA, and those that a rate limit held back.

The hub only logs what such a task raises if its end can't be stored. Its message would stay unacked for as long as the
worker lives. And a rate limit would start no more tasks until another one comes.

In: requests whose ends can't be stored, and the hub. Out: messages that go back to their queues, a while later.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any

from kombu.asynchronous.hub import Hub

from legit_worker.broker.redis import gave_up
from legit_worker.broker.refusals import give_back_request
from legit_worker.pool.messages import is_gone

logger = logging.getLogger(__name__)

#: Seconds until the message goes back: what can't be stored now may be stored then.
PAUSE = 5.0


def comes_again(request: Any, error: Exception, hub: Any) -> bool:
    """Whether a request's message goes back to its queue, since one of the hub's timers would only log this error."""
    if request is None or not _is_in_timer() or isinstance(error, tuple(hub.propagate_errors)):
        return False
    said = "the end of %s[%s] was not stored; it comes again in %.0f s"
    logger.error(said, request.name, request.id, PAUSE, exc_info=error)
    hub.call_later(PAUSE, _give_back, request)
    return True


def _give_back(request: Any) -> None:
    if not (is_gone(request.message) or gave_up(request.message)):
        give_back_request(request)


def _is_in_timer() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not Hub.fire_timers.__code__:
        frame = frame.f_back
    return frame is not None
