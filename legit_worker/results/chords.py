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

from functools import partial
from typing import Any

from legit_worker import parking
from legit_worker.results import patience
from legit_worker.results.writes import is_away

#: What Celery puts in a claim's place once the body is sent.
SENT = b"done"

#: Calls what counts a part.
_patiently = partial(patience.patiently, what="its part of a chord to be counted", waits=is_away)


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
            if not parking.park(patience.later(), "a chord's body to be sent by another worker"):
                return False
        return True

    def _is_claimed(self, group: str) -> bool:
        """Whether somebody is about to send the body, or was when it died."""
        claim_key, size_key = (self.get_key_for_group(group, suffix) for suffix in (".c", ".s"))
        claim, is_open = _patiently(lambda: (self.client.get(claim_key), self.client.exists(size_key)))[0]
        return claim not in (None, SENT) and bool(is_open)
