"""What `celery inspect stats` shows of a pool.

In: the pool's parts. Out: JSON-safe numbers. Asking changes nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from legit_worker.models.registry import Registry
from legit_worker.models.slot import Named, Slot
from legit_worker.pool.engine import Engine
from legit_worker.pool.queue import Counters
from legit_worker.pool.running import Running


def of_work(running: Running, engine: Engine) -> dict[str, Any]:
    """Tasks that have begun, and what was computed for them."""
    counters = sum(engine.counters.values(), Counters())
    apps = Counter(fiber.app for fiber in running if fiber.request is not None)  # others end a task that does not run
    return {"in_flight": apps.total(), "apps": dict(apps), "parked": running.parked, **counters.report()}


def of_models(registry: Registry, engine: Engine) -> dict[str, Any]:
    """Each model's state, bytes and batches, and the memory that all share."""
    models = {
        alias: _of_model(named.slot, engine) if alias == named.slot.alias else _of_another_name(named)
        for alias, named in registry.aliases.items()
    }
    return {"models": models, "memory": registry.residency.report()}


def _of_another_name(named: Named) -> dict[str, Any]:
    """An alias whose weights stand under another one."""
    return {"kind": named.spec.kind, "state": named.slot.state, "shares": named.slot.alias}


def _of_model(slot: Slot, engine: Engine) -> dict[str, Any]:
    info: dict[str, Any] = {
        "kind": slot.spec.kind,
        "state": slot.state,
        "weights": slot.size,
        "reserve": slot.reserve,
        "loads": slot.loads,
    }
    if slot.model is not None:
        info |= slot.model.backend
    counters = engine.counters.get(slot.alias)
    if counters is not None:
        info |= {**counters.report(), "forward_seconds": round(counters.forward_seconds, 3)}
    return info
