"""Messages over whose tasks a signal's handler raised in Celery's code: they come again, and not for ever.

In: requests that ended half-way. Out: their messages, back in their queues; and how often each one went back.
"""

from __future__ import annotations

from typing import Any

from cachetools import LRUCache

from legit_worker.broker.refusals import give_back_request, give_up_request
from legit_worker.pool.running import Key, key_of_request

#: The most messages that are known by name.
MOST_KNOWN = 10_000


class Strays:
    """One worker's. Lives on the main thread. Owns how often it gave each message back."""

    def __init__(self, most: int) -> None:
        """`most` is the setting MAX_DELIVERIES."""
        self._most = most
        self._times: LRUCache[Key, int] = LRUCache(MOST_KNOWN)

    def times(self, request: Any) -> int:
        """How often a request's message went back. From `most` on, its task fails and does not run."""
        key = key_of_request(request)
        return 0 if key is None else self._times.get(key, 0)

    def give_back(self, request: Any, error: Exception) -> None:
        """Put the message of a request that ended half-way back into its queue, unless it was acked or rejected.

        If its task's failure was interrupted, too, the message leaves its queue.
        """
        key, times = key_of_request(request), self.times(request) + 1
        if key is None or 0 < self._most < times:
            self.forget(request)
            give_up_request(request, error)
        else:
            self._times[key] = times
            give_back_request(request)

    def forget(self, request: Any) -> None:
        """A message is out of its queue. A client may send it again."""
        key = key_of_request(request)
        if key is not None:
            self._times.pop(key, None)
