"""Items that are equal, so that a batch computes one of them, and all get its output. Pure.

In: items with an identity, as they come and go. Out: which of them wait, and which items of a batch are equal.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from legit_worker.batching.fairness import Item


class Group:
    """Equal items. Lives as long as one of them."""

    __slots__ = ("identity", "waiting")

    def __init__(self, identity: Hashable) -> None:
        self.identity = identity
        #: Those that wait, as they came.
        self.waiting: dict[Item, None] = {}


class Twins:
    """The groups of the items that wait for one model. Lives on the main thread, inside a `FairQueue`."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, Group] = {}
        #: Items that wait although an equal one waits.
        self.more = 0

    def __repr__(self) -> str:
        return f"<Twins: {len(self._groups)} groups, {self.more} more items>"

    def add(self, item: Item) -> None:
        """An item waits. Without an identity, it has no equal."""
        if item.identity is None:
            return
        found = self._groups.get((item.key, item.identity))
        if found is None:
            found = self._groups[item.key, item.identity] = Group((item.key, item.identity))
        else:
            self.more += 1
        item.group, item.identity = found, None
        found.waiting[item] = None

    def remove(self, item: Item) -> None:
        """An item waits no more."""
        group = item.group
        if group is None:
            return
        del group.waiting[item]
        if group.waiting:
            self.more -= 1
        else:
            self._groups.pop(group.identity, None)  # a user's key may equal another one now, and not later


def distinct(items: Iterable[Item]) -> list[Item]:
    """The first of each group, in the order of the items."""
    found: dict[int, Item] = {}
    for item in items:
        found.setdefault(id(item.group or item), item)
    return list(found.values())


def with_twins(items: Iterable[Item]) -> list[Item]:
    """These items, none of which is equal to another, each followed by its equals that wait."""
    return [one for item in items for one in (item, *_others(item))]


def _others(item: Item) -> list[Item]:
    return [] if item.group is None else [twin for twin in item.group.waiting if twin is not item]
