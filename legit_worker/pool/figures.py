"""What `celery inspect stats`, metrics and health ask of a pool.

In: the pool's parts, and what the rooms below it have counted. Out: JSON-safe numbers for `stats`, samples for
`metrics`, and words for a probe. Asking changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from time import monotonic
from typing import Any, get_args

from celery import Celery

from legit_worker import logs, metrics
from legit_worker.broker.owners import held_here
from legit_worker.broker.tally import tally
from legit_worker.metrics.catalogue import OTHER, Sample
from legit_worker.metrics.health import Holder
from legit_worker.models.registry import Registry, default_registry
from legit_worker.models.slot import Named, Slot, State
from legit_worker.pool import fibers
from legit_worker.pool.counters import Counters
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Phase
from legit_worker.pool.intake import Intake
from legit_worker.pool.loop import Loop
from legit_worker.pool.running import Running
from legit_worker.pool.watcher import Watcher
from legit_worker.results.backend import away_since
from legit_worker.routing.lanes import lanes_of
from legit_worker.settings import Settings


def of_work(running: Running, engine: Engine) -> dict[str, Any]:
    """Tasks that have begun, and what was computed for them."""
    apps = Counter(fiber.app for fiber in running if fiber.request is not None)  # others end a task that does not run
    return {"in_flight": apps.total(), "apps": dict(apps), "parked": running.parked, **engine.computed.report()}


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


def shown(app: Celery, chosen: Settings, *parts: Any) -> Figures | None:
    """Return a pool's figures if the settings want metrics, and have the worker serve them. The log is as they say.

    A worker that was installed into does both already. One that has this pool by `-P custom` may lack that.
    """
    if chosen.log == "json":
        logs.write_json(chosen)
    if chosen.metrics_port is None:
        return None
    metrics.enable(app)
    return Figures(app, *parts)


class Figures:
    """One pool's, for metrics and health. Any thread may ask. Takes no lock; an answer may be a moment late."""

    def __init__(
        self, app: Celery, running: Running, engine: Engine, intake: Intake, loop: Loop, watcher: Watcher
    ) -> None:
        self._app = app
        self._running = running
        self._engine = engine
        self._intake = intake
        self._loop = loop
        self._watcher = watcher

    @staticmethod
    def here() -> tuple[str, float] | None:
        """The app of the task that runs here, and the seconds that the task was parked; None if none runs here."""
        fiber = fibers.current()
        return None if fiber is None else (fiber.app, fiber.clock.waited(monotonic()))

    def holder(self) -> Holder | None:
        """What has the main thread; None if the worker's own loop has it."""
        turn = self._watcher.turn
        if turn is None:
            return Holder(what="a batch", is_batch=True) if self._loop.is_turning else None
        fiber = turn.fiber
        if fiber.phase is Phase.SERVED:
            return Holder(what=f"{fiber.waits_for or 'a batch'}, for {fiber.name}", is_batch=True)
        return Holder(what=fiber.name, is_batch=False)

    @staticmethod
    def missing() -> list[str]:
        """One sentence for each pinned model that is not there."""
        slots = default_registry().slots.values()
        return [f"model {slot.alias!r} is {slot.state}" for slot in slots if slot.is_pinned and not slot.is_resident]

    def samples(self) -> Iterator[Sample]:
        """All that metrics show of the pool."""
        yield from self._of_tasks()
        for slot in default_registry().slots.values():
            yield from _of_slot(slot)
        for alias, counters in list(self._engine.counters.items()):
            yield from _of_batches(alias, counters)
        for alias, waiting in self._engine.waiting().items():
            yield "model_items_waiting", (alias,), waiting
        yield from _of_memory(default_registry())
        yield from _of_broker()
        since = away_since()
        yield "result_backend_away_seconds", (), 0 if since is None else monotonic() - since
        yield from self._of_routing()

    def _of_tasks(self) -> Iterator[Sample]:
        yield "tasks_running", (), len(self._running)
        yield "tasks_parked", (), self._running.parked
        yield "tasks_not_started", (), len(self._loop.backlog)
        yield "window", (), self._intake.limit
        yield "hold_limit", (), self._intake.most
        yield "predicted_wait_seconds", (), self._engine.waiting_seconds()

    def _of_routing(self) -> Iterator[Sample]:
        for app, counts in lanes_of(self._app).counts().items():
            yield "routed_results_total", (app, "success"), counts["sent"] - counts["failed"]
            yield "routed_results_total", (app, "failure"), counts["failed"]
            yield "dead_letters_total", ("result", app), counts["dead"]
        for app, waiting in Counter(fiber.app for fiber in self._running.delivering.copy()).items():
            yield "results_waiting", (app or OTHER,), waiting


def _of_slot(slot: Slot) -> Iterator[Sample]:
    labels = (slot.alias,)
    model = slot.model
    backend = str(slot.spec.backend)
    yield "model_info", (slot.alias, slot.spec.kind, backend, model.device if model is not None else ""), 1
    yield from (("model_state", (slot.alias, state), int(slot.state == state)) for state in get_args(State))
    yield "model_weights_bytes", labels, slot.size
    yield "model_reserve_bytes", labels, slot.reserve
    yield "model_loads_total", labels, slot.loads
    yield "model_evictions_total", labels, slot.evictions
    yield "model_load_seconds", labels, slot.load_seconds


def _of_batches(alias: str, counters: Counters) -> Iterator[Sample]:
    labels = (alias,)
    yield "batch_seconds", labels, counters.shape.seconds
    yield "batch_items", labels, counters.shape.items
    yield "batch_padded_cost", labels, counters.shape.padded_cost
    yield "computed_cost_total", labels, counters.cost
    yield "duplicate_items_total", labels, counters.duplicates
    yield "out_of_memory_total", labels, counters.out_of_memory


def _of_memory(registry: Registry) -> Iterator[Sample]:
    report = registry.residency.report()
    for name in ("budget", "weights", "reserve", "total", "free", "others", "headroom", "host_cache"):
        if (size := report.get(name)) is not None:
            yield f"memory_{name}_bytes", (), size
    yield "model_requests_waiting", (), report["waiting"] or 0


def _of_broker() -> Iterator[Sample]:
    yield "held_messages", (), held_here()
    yield "lease_renewals_total", (), tally["renewed"]
    yield "recovered_messages_total", (), tally["recovered"]
    yield "dead_letters_total", ("poisoned", ""), tally["poisoned"]
    yield "dead_letters_total", ("unreadable", ""), tally["unreadable"]
