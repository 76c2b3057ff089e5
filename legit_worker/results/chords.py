"""A chord's body that a worker was about to send when it died.

In: a part of a chord that comes again, from Celery. Out: the body, sent by whoever lives.

Celery 5.7 lets one worker claim the sending of the body, for some 10 to 20 seconds. A worker that is killed meanwhile
leaves its claim behind. Its message comes again, sooner than that: RabbitMQ gives it to another worker at once. That
worker finds the claim, sends nothing, and acks: the body would never be sent.

Sources: celery.backends.redis.RedisBackend.on_chord_part_return (5.7). Before 5.7 there are no claims.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from typing import Any

from legit_worker import parking

logger = logging.getLogger(__name__)

#: Seconds between two looks at a claim.
LOOK_SECONDS = 0.5

#: What Celery puts in a claim's place once the body is sent.
SENT = b"done"


class Claims:
    """Mixed into a Redis backend's class. Called on the tasks' thread."""

    client: Any
    get_key_for_group: Any

    def on_chord_part_return(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a part. If it comes again, wait for a claim that somebody else has, and count it once more."""
        answer = super().on_chord_part_return(request, *args, **kwargs)  # type: ignore[misc]
        if not (request.group and (request.delivery_info or {}).get("redelivered")):
            return answer
        while self._is_claimed(request.group) and parking.park(_later(), "a chord's body to be sent by another worker"):
            answer = super().on_chord_part_return(request, *args, **kwargs)  # type: ignore[misc]
        return answer

    def _is_claimed(self, group: str) -> bool:
        """Whether somebody is about to send the body, or was when it died."""
        claim = self.client.get(self.get_key_for_group(group, ".c"))
        return claim is not None and claim != SENT and bool(self.client.exists(self.get_key_for_group(group, ".s")))


def _later() -> Future[None]:
    done: Future[None] = Future()
    timer = threading.Timer(LOOK_SECONDS, done.set_result, (None,))
    timer.daemon = True
    timer.start()
    return done
