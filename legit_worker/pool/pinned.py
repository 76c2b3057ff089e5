"""The models that a worker loads before its first task.

In: the registry. Out: pinned models in memory, or the worker's end.
"""

from __future__ import annotations

import logging
from concurrent import futures

from celery.platforms import EX_FAILURE
from celery.worker.state import maybe_shutdown

from legit_worker.models.registry import Registry

logger = logging.getLogger(__name__)

#: Seconds between two looks whether the worker must stop while its pinned models load.
STOP_LOOK = 0.1


def load_pinned(registry: Registry) -> None:
    """Load all pinned models. One that can't be loaded ends the worker."""
    requests = [registry.residency.request(slot) for slot in registry.slots.values() if slot.spec.pin]
    while not all(request.future.done() for request in requests):
        futures.wait([request.future for request in requests], timeout=STOP_LOOK)
        registry.residency.review()
        maybe_shutdown()
    for request in requests:
        registry.residency.release(request)
    if errors := [str(request.future.exception()) for request in requests if request.future.exception()]:
        logger.critical("the worker ends; correct the model's settings, or unpin it: %s", "; ".join(errors))
        raise SystemExit(EX_FAILURE)
