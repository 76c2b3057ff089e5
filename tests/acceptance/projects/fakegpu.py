"""The project on a machine whose GPU is a fake of torch's calls: `LEGIT_WORKER_DEVICE=cuda`, kind `fakegpu:OnFakeGpu`.

In: strings. Out: their lengths, and how busy the GPU was when they were launched. With `PROJECT_POISON=1`, an item that
begins with `poison` breaks the GPU, as a failed assertion in a kernel does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from project import app

__all__ = ["app"]

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from fakecuda import FakeCuda, OnGpu

from legit_worker.models import budget

#: Seconds of a batch.
SECONDS = 0.05

#: What others had lately is left to them for this long, in seconds.
budget.GROWTH_SECONDS = float(os.environ.get("PROJECT_GROWTH_SECONDS", budget.GROWTH_SECONDS))

gpu = FakeCuda(seconds=SECONDS)
gpu.done.set()
gpu.install(pytest.MonkeyPatch())


class Weights:
    """As a tensor of a real GPU: freeing it after the GPU broke aborts the process."""

    def __del__(self, gpu: FakeCuda = gpu, abort: Any = os.abort) -> None:
        if gpu.broken:
            abort()


weights = Weights()


class OnFakeGpu:
    """Launches, and returns before the GPU is done."""

    def load(self, device: str) -> None:
        """Nothing to read."""
        assert device == "cuda"

    def preprocess(self, item: Any) -> Any:
        """As it came."""
        return item

    def cost(self, item: Any) -> int:
        """So large that few fit into one batch."""
        return 2048

    def forward(self, batch: Sequence[Any]) -> Any:
        """A tensor that is not there yet."""
        if os.environ.get("PROJECT_POISON") and any(item.startswith("poison") for item in batch):
            gpu.broken = "CUDA error: device-side assert triggered"
        return OnGpu(torch.tensor([[len(item), gpu.in_flight, len(batch)] for item in batch]))

    def postprocess(self, output: torch.Tensor) -> list[int]:
        """Three numbers."""
        assert output.device.type == "cpu"
        return [int(number) for number in output]
