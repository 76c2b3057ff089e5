"""legit_worker: a Celery pool that keeps models resident and computes waiting tasks together as batches.

In: an existing Celery app, and tasks that call `model(alias)`. Out: the same app, run by the same command; nothing
changes until `LEGIT_WORKER_ENABLED=1`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from legit_worker.install import install

if TYPE_CHECKING:
    from legit_worker.models.handle import Handle

__all__ = ["__version__", "exclusive", "install", "model"]
__version__ = "0.1.0"


def model(alias: str) -> Handle:
    """The model configured under `alias`. Reads nothing until it is used, so a module may keep one for good.

    Inside a ModelPool its calls park the task and share batches; anywhere else they call the model directly.
    """
    from legit_worker.models.handle import Handle

    return Handle(alias)


def exclusive() -> AbstractContextManager[None]:
    """A section in which no other task's code runs, also while a model computes.

    For what belongs to the thread rather than to the task: an open database transaction, a lock, a pooled
    connection. Other parked items may ride along in the section's batches. Outside a ModelPool it does nothing.
    """
    from legit_worker.pool.fibers import exclusive as section

    return section()
