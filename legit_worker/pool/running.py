"""Which tasks have begun, and which of them count.

In: fibers, as they begin and end. Out: how many are in progress.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from legit_worker.pool.fibers import Fiber, Phase
from legit_worker.pool.requests import message_of

#: A task's id and its retries, by which its message is known when it comes again.
Key = tuple[str, int]


class Running:
    """The tasks that have begun and are not over. Changed on the main thread; any thread may read it."""

    def __init__(self) -> None:
        self._all: dict[Fiber, Key | None] = {}
        self._early: set[Fiber] = set()
        # A client may send one id twice.
        self._by_key: dict[Key, list[Fiber]] = {}
        #: Those that wait for the delivery of their result.
        self.delivering: set[Fiber] = set()
        #: Tasks that have ever begun.
        self.begun = 0
        #: Bytes of the messages of all that run.
        self.bytes = 0
        #: How many there are of each app.
        self.by_app: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, fiber: object) -> bool:
        return fiber in self._all

    def __iter__(self) -> Iterator[Fiber]:
        return iter(self._all.copy())  # in one step, unlike tuple(): the main thread may change it meanwhile

    def add(self, fiber: Fiber) -> None:
        """One begins."""
        self.begun += 1
        self.bytes += _size(fiber.request)
        self.by_app[fiber.app] += 1
        key = self._all[fiber] = key_of_request(fiber.request)
        if key is not None:
            self._by_key.setdefault(key, []).append(fiber)
        if not fiber.acks_late:
            self._early.add(fiber)

    def discard(self, fiber: Fiber) -> None:
        """One is over."""
        if fiber in self._all:
            self.by_app[fiber.app] -= 1
            self.bytes -= _size(fiber.request)
        key = self._all.pop(fiber, None)
        self._early.discard(fiber)
        if key is not None:
            self._by_key[key].remove(fiber)
            if not self._by_key[key]:
                del self._by_key[key]

    def find(self, key: Key) -> list[Fiber]:
        """Those with this id and these retries."""
        return self._by_key.get(key, [])

    def outlasting(self, are_cancelled: bool) -> set[str]:
        """The tags of the tasks that go on if their connection to the broker is lost, and are acked later.

        If Celery then cancels tasks, only those go on whose own code is over.
        """
        return tags_of(fiber for fiber in self if fiber.phase is Phase.ENDING or not are_cancelled)

    @property
    def parked(self) -> int:
        """How many wait."""
        return sum(fiber.waits_for is not None for fiber in self)

    @staticmethod
    def is_around(fiber: Fiber) -> bool:
        """Whether a task waits before or after its own code: for what is stored of it, or for its delivery."""
        return fiber.waits_for is not None and fiber.phase in (Phase.NEW, Phase.ENDING)

    def is_storing(self, fiber: Fiber) -> bool:
        """Whether a task waits for what Celery stores of it, before or after its own code."""
        return self.is_around(fiber) and fiber not in self.delivering

    def is_over(self, fiber: Fiber) -> bool:
        """Whether a task's own code is over, and only its result must be stored."""
        return fiber.phase is Phase.ENDING and self.is_storing(fiber)

    @property
    def early(self) -> int:
        """How many run whose messages were acked when they began. Those that wait for a delivery don't count."""
        return len(self._early - self.delivering) if self._early else 0


def tags_of(fibers: Iterable[Fiber]) -> set[str]:
    """The tags of their messages, as far as these are not acked yet."""
    messages = [message_of(fiber.request) for fiber in fibers if fiber.acks_late]
    return {message.delivery_tag for message in messages if message is not None}


def key_from(identity: Any, retries: Any) -> Key | None:
    """The key of a task; None if these are not what Celery writes, as in a foreign client's message."""
    retries = retries or 0
    return (identity, retries) if isinstance(identity, str) and isinstance(retries, int) else None


def key_of_request(request: Any) -> Key | None:
    """The key of a request's task; None if what runs is no task, or its message has no such key."""
    return None if request is None else key_from(request.id, request.request_dict.get("retries"))


def _size(request: Any) -> int:
    message = message_of(request)
    return 0 if message is None else len(message.body or b"")
