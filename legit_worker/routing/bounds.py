"""How lists in Redis keep their bounds. Redis itself bounds neither their length nor the age of their entries.

In: deliveries, and a client. Out: those for which there is no room; commands that cut a list; entries that are too old
are removed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from itertools import takewhile
from time import monotonic, time
from typing import Any

from cachetools import LRUCache
from redis.exceptions import ResponseError

from legit_worker.routing.delivery import Delivery

#: Seconds between two looks for old entries of one list.
LOOK_SECONDS = 1.0

#: The most entries that one look takes away, and how many Redis gives at once: each may have some megabytes.
MOST_OLD, CHUNK = 512, 16

#: The most lists whose last look is remembered.
KNOWN_LISTS = 1000


class Room:
    """The room in the lists of some deliveries. It is read once: several workers may exceed a bound by a group each."""

    def __init__(self, client: Any, deliveries: Iterable[Delivery]) -> None:
        bounds = {one.key: one.bound for one in deliveries if one.bound.length and not one.bound.drops_oldest}
        self._most = {key: bound.length for key, bound in bounds.items()}
        self._lengths: dict[str, int] = {}
        if bounds:
            with client.pipeline(transaction=False) as pipeline:
                for key in bounds:
                    pipeline.llen(key)
                answers = pipeline.execute(raise_on_error=False)
            # An error says that the key is no list: then the push is refused.
            self._lengths = {
                key: answer for key, answer in zip(bounds, answers, strict=True) if isinstance(answer, int)
            }

    def refuses(self, delivery: Delivery) -> str:
        """Say why a delivery must wait; empty if it need not: then it takes its room."""
        key = delivery.key
        if key not in self._lengths:
            return ""
        if self._lengths[key] >= self._most[key]:
            return f"the queue has {self._lengths[key]} entries, and QUEUE_MAX_LENGTH allows {self._most[key]}"
        self._lengths[key] += 1
        return ""


def cuts(deliveries: Iterable[Delivery]) -> list[tuple[str, str, int, int]]:
    """Return the Redis commands that take the oldest entries from lists of dead letters which are too long."""
    lengths = {one.key: one.bound.length for one in deliveries if one.bound.length and one.bound.drops_oldest}
    return [("LTRIM", key, -length, -1) for key, length in lengths.items()]


class Ages:
    """Removes old entries of lists to which this worker pushes. One thread uses it."""

    def __init__(self) -> None:
        self._looked: LRUCache[str, float] = LRUCache(KNOWN_LISTS)

    def trim(self, client: Any, deliveries: Iterable[Delivery]) -> None:
        """Remove the entries that are too old, from the oldest on, up to the first that is not, or is not ours."""
        now = monotonic()
        for delivery in {one.key: one for one in deliveries if one.bound.seconds}.values():
            if now - self._looked.get(delivery.key, now - LOOK_SECONDS) >= LOOK_SECONDS:
                self._looked[delivery.key] = now
                with suppress(ResponseError):  # the key is no list
                    _remove_old(client, delivery)


def _remove_old(client: Any, delivery: Delivery) -> None:
    """Remove entries by their value: a consumer may take from the same list."""
    grows_left = delivery.chosen.format == "celery"
    before = time() - delivery.bound.seconds
    for _ in range(MOST_OLD // CHUNK):
        entries = client.lrange(delivery.key, *((-CHUNK, -1) if grows_left else (0, CHUNK - 1)))
        oldest_first = reversed(entries) if grows_left else entries
        old = list(takewhile(lambda entry: _is_older(entry, before), oldest_first))
        for entry in old:
            client.lrem(delivery.key, -1 if grows_left else 1, entry)
        if not old or len(old) < len(entries):
            return


def _is_older(entry: bytes, before: float) -> bool:
    at = _time_of(entry)
    return at is not None and at < before


def _time_of(entry: bytes) -> float | None:
    """Return when an entry came to be, in seconds since the epoch; None if it is none of ours."""
    try:
        found = json.loads(entry)
        if "properties" in found:  # a Celery message in kombu's form
            ((envelope,), *_) = json.loads(base64.b64decode(found["body"]))
        else:
            envelope = found.get("data", found)
        text = (envelope.get("dead") or {}).get("at") or envelope["finished_at"]
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
