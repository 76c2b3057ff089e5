"""legit_worker: a Celery pool that keeps models resident and computes waiting tasks together as batches.

In: an existing Celery app, and tasks that call `model(alias)`. Out: the same app, run by the same command; nothing
changes until `LEGIT_WORKER_ENABLED=1`.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from legit_worker.install import install

if TYPE_CHECKING:
    from legit_worker.models.handle import Handle

__all__ = ["__version__", "exclusive", "install", "model"]
__version__ = "0.1.0"


def model(alias: str) -> Handle:
    """Return a handle for the model of this alias. It reads nothing until it is used, so a module may keep it.

    Inside a ModelPool its calls park the task and share batches; anywhere else they call the model directly.
    """
    kind = getattr(sys.modules.get("legit_worker.models.handle"), "Handle", _Unused)
    return cast("Handle", kind(alias))


class _Unused:
    """A handle before its first use, by which it becomes one.

    Clients and beat import a project's module, too, and may have handles there. A handle's own imports take half a
    second, and they need none of them.
    """

    def __init__(self, alias: str) -> None:
        vars(self)["_alias"] = alias

    def __repr__(self) -> str:
        return f"<Handle {self._alias}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks for its own methods, as it does to copy an object
            raise AttributeError(name)
        return getattr(self._become(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._become(), name, value)

    def _become(self) -> _Unused:
        from legit_worker.models.handle import Handle

        vars(self).update(vars(Handle(self._alias)))
        object.__setattr__(self, "__class__", Handle)
        return self


def exclusive() -> AbstractContextManager[None]:
    """Return a context in which no other task's code runs, also while a model computes.

    Use it if the task holds something of the thread: an open database transaction, a lock, a pooled connection. Other
    tasks' items may ride along in the section's batches. Outside a ModelPool it does nothing.
    """
    from legit_worker.pool.fibers import exclusive as section

    return section()
