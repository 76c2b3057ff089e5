"""A project whose task says which models its own process has, under any pool."""

from __future__ import annotations

import os

from project import app

__all__ = ["app"]


@app.task(name="in_memory")
def in_memory() -> tuple[int, list[str]]:
    """This process's id, and the models in its memory."""
    from legit_worker.models.registry import default_registry

    return os.getpid(), [alias for alias, slot in default_registry().slots.items() if slot.is_resident]
