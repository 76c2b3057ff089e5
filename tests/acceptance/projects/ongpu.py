"""The project with a model whose size one chooses, for a machine with a GPU: kind `ongpu:Weighty`.

In: `PATH=weights,activations`, MiB of weights and MiB that each unit of cost takes in a batch; strings, whose cost is
their length. Out: of each string its length, and the size of its batch. One that begins with `poison` breaks the GPU
where `PROJECT_POISON=1`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from project import app

from legit_worker.device.cuda import to_device

__all__ = ["app"]

MIB = 2**20

#: Weights are filled and copied in parts of this size, as files are read.
PART = 64 * MIB


class Unmeasured:
    """Adds up ones. What its batches take is known when one has run, or has not fitted."""

    def __init__(self, path: str) -> None:
        self._weights_size, self._unit = (int(float(number) * MIB) for number in path.split(","))

    def load(self, device: str) -> None:
        """From the host, part by part."""
        self._device = torch.device(device)
        parts = max(1, self._weights_size // PART)
        size = self._weights_size // parts // 4
        self._weights = [torch.ones(size).to(self._device) for _ in range(parts)]

    def memory(self) -> int:
        """Bytes of the weights."""
        return sum(part.numel() * 4 for part in self._weights)

    def to(self, device: str) -> None:
        """Move them."""
        self._device = torch.device(device)
        self._weights = [part.to(self._device) for part in self._weights]

    def preprocess(self, item: str) -> str:
        """As it came."""
        return item

    def cost(self, item: str) -> int:
        """Its length."""
        return len(item)

    @torch.inference_mode()
    def forward(self, batch: Sequence[str]) -> torch.Tensor:
        """Shape `[n, 2]`."""
        lengths = to_device({"lengths": torch.tensor([len(item) for item in batch])}, self._device)["lengths"]
        longest = max(map(len, batch))
        space = torch.ones(len(batch), longest, max(1, self._unit // 4), device=self._device)
        space *= self._weights[0][0]
        present = torch.arange(longest, device=self._device) < lengths[:, None]
        if os.environ.get("PROJECT_POISON") and any(item.startswith("poison") for item in batch):
            self._weights[0][lengths + self._weights[0].numel()]
        return torch.stack([(space[:, :, -1] * present).sum(1), torch.full_like(lengths, len(batch))], 1)

    def postprocess(self, output: torch.Tensor) -> list[int]:
        """Two numbers."""
        assert output.device.type == "cpu"
        return [int(number) for number in output]


class Surprising(Unmeasured):
    """An item that begins with `y` takes 600 MiB, which its cost does not tell."""

    def forward(self, batch: Sequence[str]) -> torch.Tensor:
        """Shape `[n, 2]`."""
        beside = torch.ones(sum(item.startswith("y") for item in batch), 150 * MIB, device=self._device)
        return super().forward(batch) + 0 * beside.sum()


class Weighty(Unmeasured):
    """What they take is measured at its load."""

    def sample(self, cost: int) -> str:
        """A string of that length."""
        return "x" * cost


@app.task(name="allocator")
def allocator() -> dict[str, Any]:
    """What torch's allocator has, in bytes, and whether its blocks can grow."""
    segments = torch.cuda.memory_snapshot()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "most": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "expandable": all(segment["is_expandable"] for segment in segments),
        "segments": len(segments),
    }
