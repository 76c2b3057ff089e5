"""What a worker does before its first task.

In: this process, and the registry. Out: the process's collector, allocator and environment as tasks need them; pinned
models in memory, or the worker's end.
"""

from __future__ import annotations

import gc
import logging
import os
from concurrent import futures

from celery.platforms import EX_FAILURE
from celery.worker.state import maybe_shutdown

from legit_worker.device.cpu import bound_kernels, keep_freed_memory
from legit_worker.device.cuda import prepare_environment
from legit_worker.models.registry import Registry

logger = logging.getLogger(__name__)

#: Objects that are made before Python's collector looks for cycles among them, if the project has not set more. Parked
#: tasks have many, and hardly any is in a cycle: with Python's 700, the collector took 7 % of a short text's time.
COLLECT_AFTER = 10_000

#: Seconds between two looks whether the worker must stop while its pinned models load.
STOP_LOOK = 0.1


def prepare_process() -> None:
    """Set the collector, the allocator, the kernels' threads, and what CUDA and tokenizers read when they start."""
    made, *others = gc.get_threshold()
    if 0 < made < COLLECT_AFTER:
        gc.set_threshold(COLLECT_AFTER, *others)
    keep_freed_memory()
    bound_kernels()  # under `-P custom` without `install()`, nobody did before
    prepare_environment()
    # Texts are tokenized one at a time, and waking a thread pool for each takes four times the work itself.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
