"""What an operator does to the models of one process while it runs: load, unload, pin, unpin.

In: an alias. Out: a sentence that says what happens now, or `RefusedError`. Nothing here waits: loads end later.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from legit_worker.errors import LegitWorkerError
from legit_worker.models import caretaker
from legit_worker.models.policy import Request
from legit_worker.models.registry import Registry
from legit_worker.models.residency import Residency
from legit_worker.models.slot import Slot


class RefusedError(LegitWorkerError):
    """An operator's wish that can't be done; the message says why, and what to do first."""


def load(registry: Registry, alias: str) -> str:
    """Begin to load a model, if it is not there. Raises `UnknownModelError`, `RefusedError`."""
    slot = registry.get(alias)
    return _begun(registry.residency, _ask(registry.residency, slot, is_pinning=False))


def pin(registry: Registry, alias: str) -> str:
    """Keep a model in memory, from now on or from the end of its load. Raises `UnknownModelError`, `RefusedError`."""
    slot = registry.get(alias)
    told = _begun(registry.residency, _ask(registry.residency, slot, is_pinning=True))
    return f"{told}, and is pinned" if slot.is_pinned else f"{told}, and is pinned once it is there"


def unpin(registry: Registry, alias: str) -> str:
    """Let a model leave memory again, also one that waits to be pinned after its load. Raises `UnknownModelError`."""
    slot = registry.get(alias)
    registry.residency.pin(slot, False)
    caretaker.watch(registry.residency)
    return f"model {slot.alias!r} is not pinned, and may leave memory"


def unload(registry: Registry, alias: str) -> str:
    """Have a model leave memory once nobody uses it. An operator's loads that wait for memory are taken back.

    Raises `UnknownModelError`, `RefusedError`.
    """
    slot = registry.get(alias)
    if slot.is_pinned:
        raise RefusedError(f"model {slot.alias!r} is pinned: unpin it first")
    if slot.is_loading:
        raise RefusedError(f"model {slot.alias!r} is being loaded: unload it once it is there")
    was_there = slot.is_resident
    taken_back = registry.residency.unload(slot)
    if slot.is_resident:
        caretaker.watch(registry.residency)
        return f"model {slot.alias!r} leaves memory once {slot.users} calls are done with it"
    told = f"model {slot.alias!r} {'has left' if was_there else 'is not in'} memory"
    return f"{told}, and no load of an operator's waits any more" if taken_back else told


def _ask(residency: Residency, slot: Slot, *, is_pinning: bool) -> Request:
    """Ask for the model as a task does. The request ends by itself once it has the model, or its error."""
    residency.want(slot)
    request = residency.request(slot, is_operators=True, is_pinning=is_pinning)
    request.future.add_done_callback(lambda _: residency.release(request))
    caretaker.watch(residency)
    return request


def _begun(residency: Residency, request: Request) -> str:
    """Say what came of a request so far. Raises `RefusedError` if it has failed already."""
    slot = request.slot
    if request.future.done():
        error = request.future.exception()
        if error is not None:
            raise RefusedError(str(error))
        return f"model {slot.alias!r} is in memory"
    if slot.is_loading:
        return f"model {slot.alias!r} is being loaded"
    memory = residency.report()
    return (
        f"model {slot.alias!r} waits for memory (its weights take {slot.size} bytes, and the models in memory have "
        f"{memory['weights']} of {memory['budget']} bytes)"
    )


def shown(registry: Registry) -> dict[str, Any]:
    """All models and the memory that they share, as JSON."""
    now = monotonic()
    residency = registry.residency
    models = {alias: _shown(slot, residency.waiting(slot), now) for alias, slot in registry.slots.items()}
    return {"models": models, "memory": residency.report()}


def _shown(slot: Slot, waiting: int, now: float) -> dict[str, Any]:
    return {
        #: All names of these weights.
        "aliases": slot.aliases,
        "kind": slot.spec.kind,
        "state": slot.state,
        "pinned": slot.is_pinned,
        #: Whether it leaves memory once nobody uses it.
        "is_leaving": slot.is_leaving,
        "keep_alive": slot.spec.keep_alive,
        #: Bytes of its weights: in memory, or as its files have them.
        "weights": slot.size,
        "users": slot.users,
        #: Calls that wait until it is there.
        "waiting": waiting,
        #: Seconds since a call last had it; None if none ever had.
        "unused_seconds": round(now - slot.used_at, 3) if slot.used_at else None,
        "loads": slot.loads,
        "evictions": slot.evictions,
        "load_seconds": round(slot.load_seconds, 3),
        "device": None if slot.model is None else slot.model.device,
        "error": None if slot.error is None else str(slot.error),
    }


#: What an operator may do, by its name.
ACTIONS: dict[str, Callable[[Registry, str], str]] = {"load": load, "unload": unload, "pin": pin, "unpin": unpin}
