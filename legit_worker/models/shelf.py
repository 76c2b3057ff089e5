"""Evicted models whose weights wait in the host's memory, so that they come back without being read and built again.

In: models that leave the device. Out: the same ones, in host memory, for as long as there is room for them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One of them."""

    model: Any
    #: Bytes of its weights.
    size: int


class Shelf:
    """Any thread may `put`; all else happens on the loader thread. Never holds more than `limit` bytes of the host."""

    def __init__(self, limit: int) -> None:
        #: Evicted, and on the device until the next load begins. They go one by one: anybody may add another.
        self._leaving: dict[str, Kept] = {}
        self._here: LRUCache[str, Kept] = LRUCache(limit, getsizeof=lambda kept: kept.size)

    def __repr__(self) -> str:
        return f"<Shelf: {list(self._here)}, {self._here.currsize:.0f} of {self._here.maxsize:.0f} bytes>"

    @property
    def used(self) -> int:
        """Bytes of the host's memory."""
        return int(self._here.currsize)

    def put(self, alias: str, kept: Kept) -> None:
        """A model leaves the device. It is forgotten where it can't be moved, or is larger than the shelf."""
        if hasattr(kept.model, "to") and kept.size <= self._here.maxsize:
            self._leaving[alias] = kept

    def take(self, alias: str) -> Any:
        """The model, wherever its weights are by now; None where it is not here."""
        kept = self._leaving.pop(alias, None) or self._here.pop(alias, None)
        return kept and kept.model

    def clear_device(self) -> None:
        """Move what leaves to the host: the next load needs its room. The least recently used make place here."""
        while self._leaving:
            alias, kept = self._leaving.popitem()
            try:
                kept.model.to("cpu")
                self._here[alias] = kept
            except Exception:  # the host is short of memory: the model is then read from its files again
                logger.warning("model %r does not fit into the host's memory, and is forgotten", alias, exc_info=True)

    def clear(self) -> None:
        """Forget them all."""
        self._leaving.clear()
        self._here.clear()
