"""What tells items apart, if a user's own model says it. Pure.

In: an object of any class that has a hash. Out: a key that raises nothing when it is compared: between two tasks, that
would end the worker.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

#: Objects of these classes are keys as they are.
PLAIN = frozenset((type(None), bool, int, str, bytes))


class Key:
    """An object's hash, and its own comparison. What can't be compared is unlike all others."""

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Any) -> None:
        """Raises what the object's hash raises."""
        self._value, self._hash = value, hash(value)

    def __repr__(self) -> str:
        return f"<Key of a {type(self._value).__name__}>"

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        try:
            return self._value is other._value or bool(self._value == other._value)
        except Exception:
            return False


def key_of(value: Any) -> Hashable:
    """Return the object itself if it is plain, or its `Key`. Raises what its hash raises."""
    return value if type(value) in PLAIN else Key(value)
