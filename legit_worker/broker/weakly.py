"""Things that are kept as long as others keep them.

In: things, from any thread. Out: those that are still there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Weakly(Generic[Thing]):
    """What `weakref.WeakSet` is, but one thread may add to it while another goes through it."""

    def __init__(self) -> None:
        self._things: weakref.WeakValueDictionary[int, Thing] = weakref.WeakValueDictionary()

    def __iter__(self) -> Iterator[Thing]:
        refs = self._things.valuerefs()  # a list that is made in one step, unlike `values()`
        return iter([thing for ref in refs if (thing := ref()) is not None])

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def add(self, thing: Thing) -> None:
        """One more."""
        self._things[id(thing)] = thing

    def discard(self, thing: Thing) -> None:
        """One less, if it is there."""
        self._things.pop(id(thing), None)
