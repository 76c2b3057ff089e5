"""Evicted models whose weights wait in the host's memory, so that they come back without being read and built again.

In: models that leave the device. Out: the same ones, in host memory, for as long as there is room for them.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from cachetools import LRUCache

from legit_worker.models.loaded import LoadedModel

logger = logging.getLogger(__name__)

#: Seconds for which a load waits until a model that was evicted is out of everybody's hands, since who used it last has
#: it for a moment more; the same each time that Python's collector has looked for it, since a failed task has it until
#: its failure is stored, and is garbage only then; and between two looks.
GONE_SOON, GONE_LATE, GONE_LOOK = 0.02, (0.1, 0.2, 0.4, 0.8, 1.6, 0.1), 0.002


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One of them."""

    model: LoadedModel
    #: Bytes of its weights.
    size: int


class Here(LRUCache[str, Kept]):
    """Models in the host's memory."""

    def popitem(self) -> tuple[str, Kept]:
        """The one that makes place."""
        alias, kept = super().popitem()
        kept.model.unload()
        return alias, kept


class Shelf:
    """Never holds more than `limit` bytes of the host. Any thread may call it; `clear_device` waits."""

    def __init__(self, limit: int) -> None:
        #: Evicted, and on the device until somebody moves them. They go one by one: anybody may add another.
        self._leaving: dict[str, Kept] = {}
        #: Evicted and forgotten: somebody may still have them.
        self._going: deque[weakref.ref[Any]] = deque()
        self._here: LRUCache[str, Kept] = Here(limit, getsizeof=lambda kept: kept.size)
        #: Held while a model moves: whoever wants that one, or its room, waits.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Shelf: {list(self._here)}, {self._here.currsize:.0f} of {self._here.maxsize:.0f} bytes>"

    @property
    def used(self) -> int:
        """Bytes of the host's memory."""
        return int(self._here.currsize)

    def put(self, alias: str, model: LoadedModel, size: int) -> None:
        """A model leaves the device. It is forgotten if it can't be moved, or is larger than the shelf."""
        if model.can_move and size <= self._here.maxsize:
            self._leaving[alias] = Kept(model=model, size=size)
        else:
            self.forget(model)

    def forget(self, model: LoadedModel) -> None:
        """A model leaves the device for good."""
        if (going := model.unload()) is not None:
            self._going.append(going)

    def take(self, alias: str) -> LoadedModel | None:
        """The model, wherever its weights are by now; None if it is not here."""
        with self._lock:
            kept = self._leaving.pop(alias, None) or self._here.pop(alias, None)
        return None if kept is None else kept.model

    def drop(self, alias: str) -> None:
        """Forget a model that waits here."""
        model = self.take(alias)
        if model is not None:
            self.forget(model)

    def restart(self) -> None:
        """In a forked child: a thread that the child does not have may have been at it."""
        self._lock = threading.Lock()

    def move(self) -> None:
        """Have what leaves on the host. The least recently used there make place. Waits for one that another moves."""
        while True:
            with self._lock:
                if not self._leaving:
                    return
                self._move(*self._leaving.popitem())

    def _move(self, alias: str, kept: Kept) -> None:
        try:
            kept.model.move(to_host=True)
            self._here[alias] = kept
        except Exception:  # the host is short of memory: the model is then read from its files again
            logger.warning("model %r does not fit into the host's memory, and is forgotten", alias, exc_info=True)
            self.forget(kept.model)

    def clear_device(self) -> None:
        """Have what leaves on the host, or gone: the next load needs its room. Waits for that."""
        self.move()
        going = [self._going.popleft() for _ in range(len(self._going))]
        if _are_gone(going, GONE_SOON):
            return
        gc.unfreeze()  # the loader froze what a first load had brought
        for seconds in GONE_LATE:
            gc.collect()  # a failed task's traceback has frames that had it, and Celery leaves those to the collector
            if _are_gone(going, seconds):
                return


def _are_gone(models: Sequence[weakref.ref[Any]], seconds: float) -> bool:
    until = monotonic() + seconds
    while any(model() is not None for model in models):
        if monotonic() > until:
            return False
        sleep(GONE_LOOK)
    return True
