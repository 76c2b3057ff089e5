"""Parts of batches that did not go well.

In: the items of a batch. Out: the same, when the next batch is made, without those for which nobody waits any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from legit_worker.batching.fairness import Item


class Parts:
    """Parts of batches, to be tried again on their own before anything new. Lives inside a `ModelQueue`.

    An item waits in a part if its place is that part.
    """

    def __init__(self) -> None:
        self._parts: deque[list[Item]] = deque()
        self._size = 0
        #: Of the items that wait.
        self.cost = 0

    def __repr__(self) -> str:
        return f"<Parts: {len(self._parts)} with {self._size} items>"

    def __len__(self) -> int:
        return self._size

    def put(self, batch: list[Item], *, is_next: bool) -> None:
        """Have these wait again, before or behind the other parts. An item for which nobody waits is left out."""
        part = [item for item in batch if not item.chunk.is_over]
        for item in part:
            item.place = part
        self._size += len(part)
        self.cost += sum(item.cost for item in part)
        if is_next:
            self._parts.appendleft(part)
        else:
            self._parts.append(part)

    def take_next(self) -> list[Item]:
        """Take out the part that is next; an item waits."""
        while not (batch := self.take(self._parts.popleft())):
            pass
        return batch

    def take(self, part: list[Item]) -> list[Item]:
        """Take out this part."""
        return self.remove(item for item in part if item.place is part)

    def remove(self, items: Iterable[Item]) -> list[Item]:
        """Have these, which wait in a part, wait no more."""
        left = list(items)
        for item in left:
            item.place = None
        self._size -= len(left)
        self.cost -= sum(item.cost for item in left)
        return left
