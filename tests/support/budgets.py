"""Budgets for tests.

In: bytes that a test chose. Out: what `Residency` asks a budget for.
"""

from __future__ import annotations

from legit_worker.models.budget import Unbounded


class Limited(Unbounded):
    """This many bytes now, and at the most; a test may change both. Notes what the allocator is held to."""

    def __init__(self, now: int | None, most: int | None = None) -> None:
        self.now = now
        self.ever = now if most is None else most
        #: What the device's allocator is held to.
        self.limit: int | None = None

    def bytes(self, weights: int) -> int | None:
        """As the test says."""
        return self.now

    def most(self) -> int | None:
        """As the test says."""
        return self.ever

    def hold(self, limit: int | None) -> None:
        """Note it."""
        self.limit = limit
