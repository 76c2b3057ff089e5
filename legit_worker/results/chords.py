"""Parts of chords that could not be counted, or came again: the chord's body is sent all the same.

In: a part of a chord, from Celery. Out: a part that is counted, and a body that is sent by whoever lives.

If the result backend takes nothing while a part is counted, Celery fails the part, and the chord with it, or ends the
worker. Here the part's task waits. Nobody knows whether the server counted a part whose answer was lost. So it counts
the part again, as one whose message came again.

Celery 5.7 lets one worker claim the sending of the body, for some 10 to 20 seconds. A worker that is killed meanwhile
leaves its claim behind. Its message comes again, sooner than that: RabbitMQ gives it to another worker at once. That
worker finds the claim, sends nothing, and acks: the body would never be sent.

Sources: celery.backends.redis.RedisBackend.on_chord_part_return (5.7). Before 5.7 there are no claims.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from time import monotonic
from typing import Any

from legit_worker import parking
from legit_worker.results.writes import is_away

logger = logging.getLogger(__name__)

#: Seconds between two looks at a claim.
LOOK_SECONDS = 0.5

#: What Celery puts in a claim's place once the body is sent.
SENT = b"done"

#: Since when tasks wait until their part is counted, by the monotonic clock.
waiting_since: dict[object, float] = {}


class Claims:
    """Mixed into a Redis backend's class. Called on the tasks' thread."""

    client: Any
    get_key_for_group: Any

    def on_chord_part_return(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a part. If it may have been counted before, count it while nobody has a claim.

        Celery does not tell that a claim kept a part from sending the body. So nothing can be learned afterwards: a
        claim that has just ended looks like none.
        """
        count = partial(super().on_chord_part_return, request, *args, **kwargs)  # type: ignore[misc]
        if not (request.delivery_info or {}).get("redelivered") or not request.group:
            answer, was_away = _patiently(count)
            if not was_away or not request.group:
                return answer
        while True:
            is_free = self._outlasts_claim(request.group)
            answer, _ = _patiently(count)
            if not is_free or not self._is_claimed(request.group):
                return answer

    def _outlasts_claim(self, group: str) -> bool:
        """Wait until nobody has a claim. Return False if that can't be waited for."""
        while self._is_claimed(group):
            if not parking.park(_later(), "a chord's body to be sent by another worker"):
                return False
        return True

    def _is_claimed(self, group: str) -> bool:
        """Whether somebody is about to send the body, or was when it died."""
        claim_key, size_key = (self.get_key_for_group(group, suffix) for suffix in (".c", ".s"))
        claim, is_open = _patiently(lambda: (self.client.get(claim_key), self.client.exists(size_key)))[0]
        return claim not in (None, SENT) and bool(is_open)


def _patiently(call: Callable[[], Any]) -> tuple[Any, bool]:
    """Return what a call gives, and whether the server was away. As long as it is, the task waits, if it can park."""
    this = object()
    try:
        while True:
            try:
                return call(), this in waiting_since
            except Exception as error:  # noqa: PERF203
                if not is_away(error):
                    raise
                if this not in waiting_since:
                    waiting_since[this] = monotonic()
                    logger.warning("the result backend counts no part of a chord, and its task waits: %r", error)
                if not parking.park(_later(), "its part of a chord to be counted"):
                    raise
    finally:
        waiting_since.pop(this, None)


class _Look:
    """The next look. All tasks that wait share it: a thread for each would be a thousand after a worker's death."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: Future[None] | None = None

    def later(self) -> Future[None]:
        """Return what is done once it is time to look again. Any thread may call it."""
        with self._lock:
            if self._done is None:
                timer = threading.Timer(LOOK_SECONDS, self._come)
                timer.daemon = True
                timer.start()
                self._done = Future()
            return self._done

    def _come(self) -> None:
        with self._lock:
            done, self._done = self._done, None
        assert done is not None
        done.set_result(None)


_later = _Look().later
