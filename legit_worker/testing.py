"""Fakes for this project's tests, and its users': a device that keeps accounts, and models that live on it.

In: made-up sizes and speeds. Out: the same calls, errors and numbers a real device would give, without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from legit_worker.errors import DeviceOutOfMemoryError
from legit_worker.models import handle, registry
from legit_worker.models.simulated import SimulatedModel, vector
from legit_worker.settings import ModelSettings

__all__ = ["Ledger", "ModelOnDevice", "SimulatedModel", "use_models", "vector"]


@dataclass
class Ledger:
    """A simulated device's memory: bytes by owner. It refuses to overdraw, and remembers the worst moment."""

    #: Bytes that the device has.
    total: int
    owners: dict[str, int] = field(default_factory=dict)
    #: The most bytes that were ever in use.
    peak: int = 0

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(self.owners.values())

    @property
    def free(self) -> int:
        """Bytes left."""
        return self.total - self.used

    def take(self, owner: str, size: int) -> None:
        """Enter `size` bytes for `owner`. Raises `DeviceOutOfMemoryError` where they are not there."""
        if size > self.free:
            raise DeviceOutOfMemoryError(
                f"{owner} needs {size} bytes, {self.free} of {self.total} are free: "
                f"{', '.join(f'{name} has {held}' for name, held in self.owners.items()) or 'nobody has any'}"
            )
        self.owners[owner] = self.owners.get(owner, 0) + size
        self.peak = max(self.peak, self.used)

    def give_back(self, owner: str, size: int) -> None:
        """Enter that `owner` returned `size` bytes, of those that it has."""
        held = self.owners.get(owner, 0)
        if size > held:
            raise ValueError(f"{owner} gives back {size} bytes and has {held}")
        self.owners[owner] = held - size

    @contextmanager
    def held(self, owner: str, size: int) -> Iterator[None]:
        """`size` bytes for as long as the block runs: activations."""
        self.take(owner, size)
        try:
            yield
        finally:
            self.give_back(owner, size)


class ModelOnDevice(SimulatedModel):
    """A simulated model whose weights and activations are entered in a ledger."""

    def __init__(
        self, ledger: Ledger, name: str, *, weights: int, bytes_per_cost: int, path: str | None = None
    ) -> None:
        super().__init__(path)
        self._ledger = ledger
        self._name = name
        self._weights = weights
        self._bytes_per_cost = bytes_per_cost

    def load(self, device: str) -> None:
        """Enter the weights. Raises `DeviceOutOfMemoryError`."""
        self._ledger.take(self._name, self._weights)

    def memory(self) -> int:
        """Bytes of weights, as they were entered."""
        return self._weights

    def forward(self, batch: Sequence[str]) -> list[Any]:
        """As `SimulatedModel`, holding the padded batch's activations meanwhile. Raises `DeviceOutOfMemoryError`."""
        padded = len(batch) * max(map(self.cost, batch))
        with self._ledger.held(self._name, padded * self._bytes_per_cost):
            return super().forward(batch)


@contextmanager
def use_models(models: Mapping[str, ModelSettings | Mapping[str, Any]]) -> Iterator[registry.Registry]:
    """Within the block, handles find these models instead of the environment's, and call them directly on the CPU.

    ```python
    with use_models({"minilm": {"kind": "simulated"}}):
        assert my_task("some text") == ...
    ```
    """
    specs = {
        alias: spec if isinstance(spec, ModelSettings) else ModelSettings(**spec) for alias, spec in models.items()
    }
    chosen = registry.Registry(specs, lambda: "cpu")
    before = handle.find_models(lambda: chosen)
    try:
        yield chosen
    finally:
        handle.find_models(before)
