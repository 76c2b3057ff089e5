"""Tells in the log that a model is about to load, and that its load still goes on.

In: the slot of a model that begins to load. Out: lines of the log. Its end is told by whoever loads it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic

from legit_worker.models.slot import Slot

logger = logging.getLogger(__name__)

#: Seconds between two lines about a load that goes on: most loads end before the first one.
STILL_SECONDS = 10.0


@contextmanager
def load_is_told(slot: Slot, device: str) -> Iterator[None]:
    """Tell that this model loads on a device: once at the beginning, and every `STILL_SECONDS`."""
    size = f"about {slot.size / 2**20:.0f} MiB" if slot.size else "of unknown size"
    logger.info("model %r (kind %s, path %s) loads on %s, %s", slot.alias, slot.spec.kind, slot.spec.path, device, size)
    is_over = threading.Event()
    with suppress(RuntimeError):  # no thread can start: the load goes on without these lines
        threading.Thread(target=_tell, args=(slot.alias, is_over), name="legit-load-told", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _tell(alias: str, is_over: threading.Event) -> None:
    start = monotonic()
    while not is_over.wait(STILL_SECONDS):
        logger.info("model %r still loads, since %.0f s", alias, monotonic() - start)
