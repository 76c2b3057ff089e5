"""What a worker sets for its whole process, before any task begins."""

from __future__ import annotations

import gc
import os

from legit_worker.device.cpu import bound_kernels, keep_freed_memory
from legit_worker.device.cuda import prepare_environment

#: Objects that are made before Python's collector looks for cycles among them, if the project has not set more. Parked
#: tasks have many, and hardly any is in a cycle: with Python's 700, the collector took 7 % of a short text's time.
COLLECT_AFTER = 10_000


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
