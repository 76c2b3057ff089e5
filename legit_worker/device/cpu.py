"""What makes batches faster on a CPU: the allocator, and the library that multiplies matrices.

In: this process; a loaded model. Out: a process that keeps the memory it frees, and a model whose linear layers go
through oneDNN where that was measured, on this machine and this model, to be faster than what torch picks by itself.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

logger = logging.getLogger(__name__)

#: Bytes. Blocks up to this size come from the heap instead of a mapping of their own. The most that glibc takes.
MMAP_THRESHOLD = 32 * 2**20

#: Bytes of free heap that are kept: a batch's activations, several times over.
TRIM_THRESHOLD = 256 * 2**20

#: glibc's numbers for the two, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have freed memory used again. Does nothing where the C library is not glibc.

    A batch allocates and frees some megabytes per layer. By default the system maps and clears them anew each time:
    5,000 to 12,000 page faults per batch of MiniLM, a tenth to a sixth of its time; with this, none.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


#: Rows of the trial product, about the tokens of a usual batch.
TRIAL_ROWS = 512

#: The best of so many products counts: a shared machine's noise only ever adds.
TRIALS = 7

#: oneDNN must be this many times as fast as torch's own choice, or nothing is changed.
WORTH_IT = 1.1


def speed_up_linear_layers(model: Any) -> float:
    """Have a model's float32 linear layers on the CPU computed by oneDNN, where a trial shows that to be faster.

    For float32, torch always takes MKL; on an AMD processor with AVX-512 that reaches less than half of what oneDNN
    does. Weights stay as they are, and the results differ by rounding only. `model` is a `torch.nn.Module`. Returns
    how many times as fast the trial was, 1.0 where nothing was changed.
    """
    import torch

    layers: list[Any] = [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    ]
    if not layers or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 1.0
    gain = _trial(max(layers, key=lambda layer: layer.weight.numel()))
    if gain < WORTH_IT:
        return 1.0
    for layer in layers:
        layer.forward = functools.partial(_by_onednn, layer)
    logger.info("%d linear layers go through oneDNN, %.1f times as fast here as MKL", len(layers), gain)
    return gain


def _by_onednn(layer: Any, rows: Any) -> Any:
    """`torch.nn.Linear.forward`, by the operator that torch's own compiler uses for it on a CPU."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")


def _trial(layer: Any) -> float:
    """How many times as fast oneDNN is on this layer; 0 where it fails, or where the results are not the same."""
    import torch

    with torch.inference_mode():
        rows = torch.randn(TRIAL_ROWS, layer.in_features)
        try:
            if not torch.allclose(layer(rows), _by_onednn(layer, rows), rtol=1e-4, atol=1e-4):
                return 0.0
        except (RuntimeError, NotImplementedError):  # a build of torch without oneDNN
            return 0.0
        return _best(lambda: layer(rows)) / _best(lambda: _by_onednn(layer, rows))


def _best(product: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs."""

    def once() -> float:
        start = perf_counter()
        product()
        return perf_counter() - start

    return min(once() for _ in range(TRIALS))
