"""Fakes for this project's tests, and its users': a device that keeps accounts, and models that live on it.

In: made-up sizes and speeds. Out: the same calls, errors and numbers a real device would give, without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from legit_worker.device.simulated import Ledger
from legit_worker.models import registry
from legit_worker.models.simulated import SimulatedModel, vector
from legit_worker.settings import ModelSettings

__all__ = ["Ledger", "ModelOnDevice", "SimulatedModel", "use_models", "vector"]


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
