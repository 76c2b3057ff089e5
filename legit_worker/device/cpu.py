"""What makes batches faster on a CPU: the allocator, and the library that multiplies matrices; and what they keep.

In: this process; a loaded model. Out: a process that uses freed memory again and keeps few kernels, and a model whose
linear layers go through oneDNN where that was measured, on this machine and this model, to be faster than what torch
picks by itself.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
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


def give_back_freed() -> None:
    """Give what is free back to the system, once. Does nothing where the C library is not glibc.

    For the end of a load: what it freed lies in a part of the heap that is its thread's, and no batch uses it.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


#: Kernels that are kept, each for one shape: a batch of a transformer needs about five, of a ResNet about 25. Each
#: takes one or two megabytes, and by default a thousand are kept.
KERNELS = 32

#: How many oneDNN keeps, by its variable's new name and its old one, and how many torch does above that.
ONEDNN_CACHE, ONEDNN_CACHE_BEFORE, TORCH_CACHE = (
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "DNNL_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY",
)


def bound_kernels() -> None:
    """Have oneDNN keep few kernels, unless the operator's environment says how many.

    oneDNN makes a kernel for each shape of a batch, and there is no end of shapes. Both caches read the environment
    when torch first computes with oneDNN, so call this before. The import of torch may be over.
    """
    if ONEDNN_CACHE_BEFORE not in os.environ:
        os.environ.setdefault(ONEDNN_CACHE, str(KERNELS))
    os.environ.setdefault(TORCH_CACHE, str(KERNELS))


#: Rows, tokens that is, of the trial products: a lone long text, a usual batch. Fewer rows are left to MKL: weights are
#: read once either way, and there is little to gain.
TRIAL_ROWS = (64, 256)

#: Layers that are tried, from all over the model: enough that each finds its weights out of the caches, as it will.
TRIAL_LAYERS = 36

#: The best of so many runs counts: a shared machine's noise only ever adds.
TRIALS = 3

#: oneDNN must be this many times as fast as torch's own choice, or nothing is changed.
WORTH_IT = 1.1


def speed_up_linear_layers(model: Any) -> int | None:
    """Have a model's float32 linear layers on the CPU computed by oneDNN, where a trial shows that to be faster.

    For float32, torch always takes MKL; on an AMD processor with AVX-512 that reaches less than half of what oneDNN
    does. Weights stay as they are, which oneDNN must rearrange each time, so a few rows are still better off with MKL.
    The results differ by rounding only. `model` is a `torch.nn.Module`. Returns the rows from which oneDNN computes,
    None where it never does.
    """
    import torch

    layers: list[Any] = [
        layer for layer in model.modules() if type(layer) is torch.nn.Linear and _is_float32_on_cpu(layer)
    ]
    if not layers or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    rows = _rows_worth_it(layers[:: -(-len(layers) // TRIAL_LAYERS)])
    if rows is not None:
        for layer in layers:
            layer.forward = functools.partial(_forward, layer, rows)
        logger.info("%d linear layers go through oneDNN from %d rows", len(layers), rows)
    return rows


def _is_float32_on_cpu(layer: Any) -> bool:
    import torch

    return bool(layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu")


def _forward(layer: Any, least_rows: int, rows: Any) -> Any:
    """`torch.nn.Linear.forward`, by whichever library is faster for so many rows."""
    import torch

    if rows.numel() < least_rows * layer.in_features:
        return torch.nn.functional.linear(rows, layer.weight, layer.bias)
    return _by_onednn(layer, rows)


def _by_onednn(layer: Any, rows: Any) -> Any:
    """The operator that torch's own compiler uses for linear layers on a CPU."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")


def _rows_worth_it(layers: Sequence[Any]) -> int | None:
    """The fewest of `TRIAL_ROWS` from which oneDNN is faster and gives the same; None where it fails, or never is."""
    worth_it = None
    for rows in reversed(TRIAL_ROWS):
        try:
            if _gain(layers, rows) < WORTH_IT:
                break
        except (RuntimeError, NotImplementedError):  # a build of torch without oneDNN
            break
        worth_it = rows
    return worth_it


def _gain(layers: Sequence[Any], rows: int) -> float:
    """How many times as fast oneDNN is on these layers, one after the other; 0 where the results are not the same."""
    import torch

    with torch.inference_mode():
        inputs = [torch.randn(rows, layer.in_features) for layer in layers]
        pairs = list(zip(layers, inputs, strict=True))
        if not all(torch.allclose(layer(x), _by_onednn(layer, x), rtol=1e-4, atol=1e-4) for layer, x in pairs):
            return 0.0
        by_torch = _best(lambda: [layer(x) for layer, x in pairs])
        return by_torch / _best(lambda: [_by_onednn(layer, x) for layer, x in pairs])


def _best(products: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs."""

    def once() -> float:
        start = perf_counter()
        products()
        return perf_counter() - start

    return min(once() for _ in range(TRIALS))
