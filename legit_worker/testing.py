"""Fakes for this project's tests, and its users': a device that keeps accounts, models that live on it, a small pool.

In: made-up sizes and speeds. Out: the same calls, errors and numbers a real device would give, without one. The pytest
plugin (`legit_worker_pytest.py`) has fixtures for the same.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from legit_worker import parking
from legit_worker.device.simulated import Ledger
from legit_worker.models import handle, registry
from legit_worker.models.simulated import SimulatedModel, vector
from legit_worker.settings import ModelSettings

if TYPE_CHECKING:
    from celery import Celery

__all__ = [
    "Ledger",
    "ModelOnDevice",
    "SimulatedModel",
    "Together",
    "assert_batched",
    "memory_app",
    "run_together",
    "use_models",
    "vector",
]

#: Seconds without any step after which calls that run together are given up: a model's load counts as one step.
STUCK_SECONDS = 60.0

T = TypeVar("T")


class ModelOnDevice(SimulatedModel):
    """A simulated model whose weights and activations are entered in a ledger of the test's own."""

    def __init__(
        self, ledger: Ledger, name: str, *, weights: int, bytes_per_cost: int, path: str | None = None
    ) -> None:
        seconds = path or "0,0"
        super().__init__(f"{seconds},{weights},0,{bytes_per_cost}", alias=name, ledger=ledger)


@contextmanager
def use_models(
    models: Mapping[str, ModelSettings | Mapping[str, Any]], cache_dir: Path | None = None
) -> Iterator[registry.Registry]:
    """Within the block, handles and a worker's pool find these models instead of the environment's, on the CPU.

    `cache_dir`: as the setting of this name.

    ```python
    with use_models({"minilm": {"kind": "simulated"}}):
        assert my_task("some text") == ...
    ```
    """
    specs = {
        alias: spec if isinstance(spec, ModelSettings) else ModelSettings(**spec) for alias, spec in models.items()
    }
    chosen = registry.Registry(specs, lambda: "cpu", cache_dir=cache_dir)
    before = registry.use(chosen)
    try:
        yield chosen
    finally:
        registry.use(before)


@dataclass(frozen=True, kw_only=True)
class Together:
    """What calls gave that ran together."""

    #: In the order of the arguments.
    results: list[Any]
    #: How many batches were computed, by the model's alias.
    batches: dict[str, int]
    #: How many items were in them. Equal items that wait together are computed once, and count once.
    items: dict[str, int]


def run_together(function: Callable[[T], Any], arguments: Iterable[T]) -> Together:
    """Call `function(argument)` for each argument, all at once, as `ModelPool` runs tasks that came together.

    `function` may be a Celery task: its code runs here, and no broker is asked. Calls park at model calls, and what
    waits is computed as batches, in this thread. Raises what the first call raised that failed.
    """
    return _SmallPool().run(function, list(arguments))


def assert_batched(function: Callable[[T], Any], arguments: Iterable[T], *, at_most: int | None = None) -> list[Any]:
    """Assert that calls which come together share batches, and return their results, in order.

    No model may compute more than `at_most` batches; by default, half as many as there are arguments. Raises
    `AssertionError` with both numbers, and what the first call raised that failed.
    """
    each = list(arguments)
    allowed = max(1, len(each) // 2) if at_most is None else at_most
    done = run_together(function, each)
    assert done.batches, f"{len(each)} calls of {_name(function)} called no model"
    for alias, batches in done.batches.items():
        assert batches <= allowed, (
            f"{len(each)} calls of {_name(function)} took {batches} batches of model {alias!r}, and may take "
            f"{allowed}. A call that runs alone is in exclusive(), in a database transaction, or in a thread of its own"
        )
    return done.results


@contextmanager
def memory_app(name: str = "tests") -> Iterator[Celery]:
    """Give a Celery app that needs no server: `delay` runs the task at once, and its result is kept in memory.

    It has the built-in tasks, with the aliases and the limits of the environment's settings as they are now. Celery's
    current app is the same as before, once the block is over.
    """
    from celery import Celery, _state

    from legit_worker import settings, task_limits, tasks

    before = _state._tls.current_app
    task_limits.forget()
    app = Celery(name, broker="memory://", backend="cache+memory://")
    app.conf.update(task_always_eager=True, task_store_eager_result=True)
    tasks.register(app, settings.load())
    try:
        yield app
    finally:
        app.close()
        _state._set_current_app(before)
        task_limits.forget()


class _SmallPool:
    """The parts of a pool that run fibers and compute batches, without Celery. Lives on one thread, for one run."""

    def __init__(self) -> None:
        from legit_worker.pool.engine import Engine

        self._engine = Engine(max_batch_seconds=0.5, weight_of=lambda app: 1.0)
        self._ready: deque[Any] = deque()
        self._something = threading.Event()
        #: A pool's loop has it: the device is never lost here.
        self.lost = None

    def run(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Together:
        """See `run_together`."""
        from legit_worker.pool.fibers import Fiber

        results: list[Any] = [None] * len(arguments)
        errors: dict[int, BaseException] = {}

        def call(place: int) -> None:
            try:
                results[place] = function(arguments[place])
            except Exception as error:
                errors[place] = error

        fibers = [
            Fiber(partial(call, place), app="", name=f"{_name(function)} {place}", wake=self._wake)
            for place in range(len(arguments))
        ]
        with self._hosting():
            self._ready.extend(fibers)
            self._advance(fibers)
        if errors:
            raise errors[min(errors)]
        counted = self._engine.counters.items()
        batches, items = ({alias: getattr(one, part) for alias, one in counted} for part in ("batches", "items"))
        return Together(results=results, batches=batches, items=items)

    def _wake(self, fiber: Any) -> None:
        """Any thread may call it."""
        self._ready.append(fiber)
        self._something.set()

    @contextmanager
    def _hosting(self) -> Iterator[None]:
        from legit_worker.pool.computing import Computing
        from legit_worker.pool.host import FiberHost
        from legit_worker.pool.running import Running

        loop: Any = self
        handle.use_compute(Computing(self._engine, loop).compute)
        parking.use(FiberHost(loop, self._engine, Running(), is_inline=False))
        try:
            yield
        finally:
            handle.use_compute(handle.compute_directly)
            parking.stop()

    def _advance(self, fibers: Sequence[Any]) -> None:
        """Let all run that can, then compute one batch, until all calls are over."""
        stuck_at = time.monotonic() + STUCK_SECONDS
        while not all(fiber.dead for fiber in fibers):
            self._something.clear()
            if self._step():
                stuck_at = time.monotonic() + STUCK_SECONDS
            elif not self._something.wait(max(0.0, stuck_at - time.monotonic())):
                waiting = "; ".join(repr(fiber) for fiber in fibers if not fiber.dead)
                raise AssertionError(f"nothing has happened for {STUCK_SECONDS} s: {waiting}")

    def _step(self) -> bool:
        """Whether anything could be done."""
        ready = [self._ready.popleft() for _ in range(len(self._ready))]
        for fiber in ready:
            fiber.woken = False
            if not fiber.dead:
                fiber.resume()
        return bool(ready) or (self._engine.can_step and self._engine.step()) or self._engine.collect()


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or getattr(function, "name", None) or repr(function)
