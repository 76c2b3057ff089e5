"""What differs among workers that share their settings: several GPUs, one worker for each.

In: settings, and which of `WORKERS` this process is. Out: its own device and models; the queues of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from legit_worker.settings.schema import Settings
from legit_worker.settings.values import fold, spelled


def take_name(hostname: str, settings: Settings) -> bool:
    """Note for this process and its children which worker it is. Returns whether the settings tell of this worker."""
    node = hostname.partition("@")[0].lower()
    if settings.node is None and node in settings.workers:
        os.environ[spelled(("node",))] = node
        return True
    return False


def strange_name(hostname: str, settings: Settings) -> Iterator[str]:
    """Yield a sentence if the settings tell of workers that run models, and of none with this worker's name."""
    if settings.workers and settings.node is None and settings.role == "device":
        names = list(settings.workers)
        yield (
            f"this worker is named {hostname.partition('@')[0]!r}, and the settings tell of {', '.join(names)}: it "
            f"takes no device, models or queues of theirs. If it is one of these, start it as -n {names[0]}@%h"
        )


def of_this_worker(settings: Settings) -> Settings:
    """Return the settings with this worker's own device and models."""
    own = settings.workers.get(settings.node or "")
    if own is None:
        return settings
    models = {alias: settings.models[alias] for alias in models_of(settings, settings.node or "")}
    return settings.model_copy(update={"models": models, "device": own.device or settings.device})


def models_of(settings: Settings, node: str) -> list[str]:
    """Return the aliases of a worker's models."""
    wanted = settings.workers[node].models
    return [alias for alias in settings.models if wanted is None or fold(alias) in map(fold, wanted)]


def queue_of(settings: Settings, alias: str) -> str:
    """Return the queue of tasks for a model."""
    return settings.model_queues.replace("{model}", fold(alias))


def problems(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each name that stands for nothing."""
    known = set(map(fold, settings.models))
    for node, own in settings.workers.items():
        for alias in own.models or ():
            if fold(alias) not in known:
                names = ", ".join(settings.models) or "none"
                yield f"{spelled(('workers', node, 'models'))} names {alias!r}, which is no model; there are: {names}"
    if settings.node is not None and settings.node not in settings.workers:
        names = ", ".join(settings.workers) or "none"
        yield f"{spelled(('node',))}={settings.node!r} is none of the workers in the settings; there are: {names}"
