"""What a peer without Celery is run by: orders come from a list in Valkey, and answers go to another.

In, as the first argument: the address of a database that is the peer's own. Out: for each order, the seconds that
`compute` took, and vectors. Making vectors of what came back isn't timed, as for tasks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import redis

#: One text, or the texts of one call.
Item = str | list[str]


class Peer:
    """What a script of this folder fills in."""

    def tune(self, items: Sequence[Item]) -> None:
        """Warm up, and choose what depends on the texts. Not timed."""
        self.compute(items[:24])

    def compute(self, items: Sequence[Item]) -> Any:
        """All items, as fast as it can."""
        raise NotImplementedError

    def vectors(self, computed: Any) -> list[Any]:
        """One per text."""
        return [[float(number) for number in vector] for vector in computed]


def serve(peer: Peer) -> None:
    """Forever."""
    store: Any = redis.Redis.from_url(sys.argv[1], socket_timeout=None)
    while True:
        order = json.loads(store.blpop("orders")[1])
        if order["tune"]:
            peer.tune(order["items"])
        started = time.perf_counter()
        computed = [] if order["tune"] else peer.compute(order["items"])
        seconds = time.perf_counter() - started
        store.rpush("answers", json.dumps({"seconds": seconds, "vectors": peer.vectors(computed)}))


def flat(items: Sequence[Item]) -> list[str]:
    """All texts in a row."""
    return [text for item in items for text in ([item] if isinstance(item, str) else item)]
