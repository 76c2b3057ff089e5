"""The only module that asks torch about CUDA.

In: `LEGIT_WORKER_DEVICE`. Out: the name of the device that models are loaded on.
"""

from __future__ import annotations


def choose(setting: str) -> str:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`: `auto` is CUDA where torch sees it, else the CPU."""
    if setting != "auto":
        return setting
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
