"""The only module that asks torch about CUDA.

In: `LEGIT_WORKER_DEVICE`. Out: the name of the device that models are loaded on.
"""

from __future__ import annotations

import os

from legit_worker.device.vram import Gpu, VramUnknownError, visible_gpus


def choose(setting: str) -> str:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`: `auto` is CUDA where torch sees it, else the CPU."""
    if setting != "auto":
        return setting
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu(setting: str) -> Gpu | None:
    """The GPU that `choose` would give, by NVML; None where that is the CPU. Opens no context, imports no torch.

    Raises `VramUnknownError`.
    """
    gpus = visible_gpus()
    number = int(setting.partition(":")[2] or 0)
    if setting == "auto" and not gpus:
        return None
    if number >= len(gpus):
        raise VramUnknownError(f"LEGIT_WORKER_DEVICE={setting}, and CUDA shows {len(gpus)} GPUs to this process")
    return gpus[number]


def count_as_nvml_does() -> None:
    """Have CUDA number GPUs by their PCI addresses, unless the operator chose. Before torch is imported."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
