"""What makes batches faster on a CPU: the allocator, and the library that multiplies matrices.

In: this process; a loaded model. Out: a process that uses freed memory again and keeps few kernels. If a trial on this
machine shows that oneDNN computes the model's linear layers faster than torch's own choice, oneDNN computes them.
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

from legit_worker.device.imported import imported

logger = logging.getLogger(__name__)

#: Blocks of up to this many bytes come from the heap, and not from a mapping of their own. glibc allows no more.
MMAP_THRESHOLD = 32 * 2**20

#: The bytes of free heap that the process keeps: a batch's activations, several times over.
TRIM_THRESHOLD = 256 * 2**20

#: The heaps of a process: one for the thread of batches, and one for all others. By default there are up to eight for
#: each core, and what is freed in one of them serves no other. Models that came and went 70 times took 100 MiB more.
HEAPS = 2

#: The operator's own number of heaps.
HEAPS_VARIABLE = "MALLOC_ARENA_MAX"

#: glibc's numbers for the three, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Make the process use freed memory again. Does nothing if the C library is not glibc.

    A batch allocates and frees some megabytes per layer. By default the system maps and clears new pages each time:
    5,000 to 12,000 page faults per batch of MiniLM, a tenth to a sixth of its time. With this there are none.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        if HEAPS_VARIABLE not in os.environ:
            libc.mallopt(M_ARENA_MAX, HEAPS)


def give_back_freed() -> None:
    """Give free memory back to the system, once. Does nothing if the C library is not glibc.

    A load ends with this: its thread freed memory in another heap than that of batches.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def compute_on_one_thread() -> None:
    """Have torch compute without other threads: a forked child has none of its parent's, and would wait for them."""
    torch = imported("torch")
    if torch is not None:
        torch.set_num_threads(1)


#: The number of kernels that the process keeps, each for one shape. A batch of a transformer needs about five, of a
#: ResNet about 25. A kernel takes one or two megabytes, and by default a process keeps a thousand.
KERNELS = 32

#: The variables that bound oneDNN's cache, by its new and its old name, and torch's cache above it.
ONEDNN_CACHE, ONEDNN_CACHE_BEFORE, TORCH_CACHE = (
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "DNNL_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY",
)


def bound_kernels() -> None:
    """Make oneDNN keep few kernels, unless the operator's environment has a number.

    oneDNN makes a kernel for each shape of a batch, and there is no end of shapes. Both caches read the environment
    when torch first computes with oneDNN. So call this before, if need be after the import of torch.
    """
    if ONEDNN_CACHE_BEFORE not in os.environ:
        os.environ.setdefault(ONEDNN_CACHE, str(KERNELS))
    os.environ.setdefault(TORCH_CACHE, str(KERNELS))


#: Rows (tokens) of the trial products: a lone long text, and a usual batch. MKL computes fewer rows: both libraries
#: read the weights once, so there is little to gain.
TRIAL_ROWS = (64, 256)

#: The most layers that a trial computes, from all over the model: too many for their weights to stay in the caches, as
#: in a real batch.
TRIAL_LAYERS = 36

#: A trial runs this many times, and the fastest run counts: other load on the machine only adds time.
TRIALS = 3

#: oneDNN must be this many times as fast as torch's own choice, or the model stays as it is.
WORTH_IT = 1.1


def speed_up_linear_layers(model: Any) -> int | None:
    """Let oneDNN compute a model's float32 linear layers on the CPU, if a trial shows that it is faster.

    For float32, torch always takes MKL. On an AMD processor with AVX-512, MKL reaches less than half of oneDNN's speed.
    The weights keep their layout, which oneDNN must rearrange each time, so MKL still computes a few rows faster.
    The results differ by rounding only. `model` is a `torch.nn.Module`. Returns the rows from which oneDNN computes,
    None if it never does.
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
        logger.debug("oneDNN computes %d linear layers for batches of %d rows or more", len(layers), rows)
    return rows


def _is_float32_on_cpu(layer: Any) -> bool:
    import torch

    return bool(layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu")


def _forward(layer: Any, least_rows: int, rows: Any) -> Any:
    """Compute `torch.nn.Linear.forward` by the library that is faster for this number of rows."""
    import torch

    least = least_rows * layer.in_features
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # a trace would have the way of its example for good
        return _script()(rows, layer.weight, layer.bias, least)
    if rows.numel() < least:
        return torch.nn.functional.linear(rows, layer.weight, layer.bias)
    return _by_onednn(layer, rows)


@functools.cache
def _script() -> Any:
    """Make the same for TorchScript. A trace of the operator itself can't take its list of numbers (torch 2.13)."""
    import torch

    def by_size(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, least: int) -> torch.Tensor:
        if rows.numel() < least:
            return torch.nn.functional.linear(rows, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]

    return torch.jit.script(by_size)


def _by_onednn(layer: Any, rows: Any) -> Any:
    """Call the operator that torch's own compiler uses for linear layers on a CPU."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, "none", [], "")


def _rows_worth_it(layers: Sequence[Any]) -> int | None:
    """Return the fewest of `TRIAL_ROWS` for which oneDNN is faster and as exact; None if there are none."""
    worth_it = None
    for rows in reversed(TRIAL_ROWS):
        try:
            if _gain(layers, rows) < WORTH_IT:
                break
        except (RuntimeError, NotImplementedError):  # this build of torch has no oneDNN
            break
        worth_it = rows
    return worth_it


def _gain(layers: Sequence[Any], rows: int) -> float:
    """Return how many times as fast oneDNN computes these layers in a row; 0 if its results differ."""
    import torch

    own = torch.Generator().manual_seed(0)  # a task may have seeded torch's own one, and draw from it meanwhile
    with torch.inference_mode():
        inputs = [torch.randn(rows, layer.in_features, generator=own) for layer in layers]
        pairs = list(zip(layers, inputs, strict=True))
        if not all(torch.allclose(layer(x), _by_onednn(layer, x), rtol=1e-4, atol=1e-4) for layer, x in pairs):
            return 0.0
        by_torch = _best(lambda: [layer(x) for layer, x in pairs])
        return by_torch / _best(lambda: [_by_onednn(layer, x) for layer, x in pairs])


def _best(products: Callable[[], object]) -> float:
    """Return the seconds of the fastest run."""

    def once() -> float:
        start = perf_counter()
        products()
        return perf_counter() - start

    return min(once() for _ in range(TRIALS))
