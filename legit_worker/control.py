"""Remote control commands: `celery inspect legit_models`, `celery control legit_load ALIAS`, and its like.

In: a command, by the broker. Out: a reply at once; a load ends later. Under ModelPool this runs between two batches, on
the main thread. `register` has a worker answer the commands; `describe` makes them known to the `celery` command.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from celery.concurrency.prefork import TaskPool
from celery.worker.control import Panel

#: Why nothing can be done from here.
IS_PREFORK = (
    "under the prefork pool, each process loads models of its own, which no command reaches: start the worker with "
    "--pool=solo, or set KEEP_ALIVE for the model"
)
IS_PREP = "this worker has the role prep, and holds no model on a device"


#: By action: the first line of its help.
HELP = {
    "load": "Load a model, before a task asks for it.",
    "unload": "Let a model leave memory once nobody uses it.",
    "pin": "Load a model, and keep it until it is unpinned.",
    "unpin": "Let a pinned model leave memory again.",
}


class _Commands(Panel):
    """Our commands. `Panel.meta`, which the `celery` command reads, gets them; `Panel.data`, which workers read, not.

    The `celery` command of a worker is the process that becomes this worker, also if legit_worker is off.
    """

    data: ClassVar[dict[str, Any]] = {}


def describe() -> None:
    """Make the commands known to the `celery` command: their names, arguments and help. May be called again."""
    shows = "Show each model's state, bytes, users, last use and loads."
    _Commands.register(type="inspect", name="legit_models", help=shows)(_models)
    for action, help_line in HELP.items():
        named = _Commands.register(name=f"legit_{action}", args=[("alias", str)], signature="<alias>", help=help_line)
        named(partial(_answer, action=action))


def register() -> None:
    """Have this worker answer the commands. May be called again."""
    describe()
    Panel.data.update(_Commands.data)


def _models(state: Any, **_: Any) -> dict[str, Any]:
    return _answer(state)


def _answer(state: Any, action: str | None = None, alias: str = "", **_: Any) -> dict[str, Any]:
    from legit_worker import settings
    from legit_worker.errors import LegitWorkerError, UnknownModelError
    from legit_worker.models import operator
    from legit_worker.models.registry import default_registry

    if settings.is_prep():
        return {"error": IS_PREP}
    if isinstance(state.consumer.pool, TaskPool):
        return {"error": IS_PREFORK}
    try:
        registry = default_registry()
        if action is None:
            return operator.shown(registry)
        return {"ok": operator.ACTIONS[action](registry, alias)}
    except UnknownModelError as error:  # perhaps another worker's
        return {"error": str(error), "is_unknown": True}
    except LegitWorkerError as error:
        return {"error": str(error)}
