"""The only module that asks torch about CUDA, and the only one that computes with it.

In: `LEGIT_WORKER_DEVICE`; batches. Out: the device's name; launches that return before the GPU is done, so that the
main thread goes on to the next task meanwhile.

`tests/gpu` runs it on a GPU, and `tests/unit/test_cuda_device.py` over a fake of the calls that it makes.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from time import monotonic
from typing import Any

from legit_worker.device.devices import Device, Launch
from legit_worker.device.loaded import started_cuda
from legit_worker.device.vram import Gpu, VramUnknownError, visible_gpus

#: How torch's allocator is told to let its blocks grow instead of leaving holes between them. Read once, at import.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

#: Its name from torch 2.9 on, which still reads the other.
ALLOCATOR_ALSO = "PYTORCH_ALLOC_CONF"

#: Bytes of weights that are copied at once.
PART = 16 * 2**20


def choose(setting: str) -> str:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`: `auto` is CUDA if there is a torch and it sees it."""
    if setting != "auto":
        return setting
    if find_spec("torch") is None:
        return "cpu"
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


def prepare_environment() -> None:
    """Before torch is imported, where the operator chose nothing else: CUDA numbers GPUs by their PCI addresses, as
    NVML does, and torch's allocator lets blocks grow."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if ALLOCATOR_ALSO not in os.environ:
        os.environ.setdefault(*ALLOCATOR)


@functools.cache
def cuda_device(name: str) -> CudaDevice:
    """The one of this process for `cuda` or `cuda:N`."""
    return CudaDevice(name)


class CudaDevice(Device):
    """A GPU. Batches are launched on the calling thread's stream, weights come by a stream of their own."""

    tells_memory = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        #: With its number: without one, torch means whichever is current, which a task may have changed.
        self._numbered = name if ":" in name else f"{name}:0"
        #: The allocator counts one peak for the process: the loader's trial batches and the engine's take turns. A
        #: model's `forward` may call another model.
        self._counting = threading.RLock()
        #: The most that torch's allocator may have, and whether weights are being read, when that does not count.
        self._limit: int | None = None
        self._is_loading = False
        self._holding = threading.Lock()

    def launch(self, compute: Callable[[], Any]) -> Launch:
        """Queue a batch's kernels, and the copy of its outputs to the host behind them. Raises what `compute` raises.

        Returns before the GPU is done, unless `compute` itself waits for it.
        """
        cuda = _torch().cuda
        start = monotonic()
        # Events belong to the device that is current when they are recorded.
        with self._counting, cuda.device(self._numbered):
            began = cuda.Event(enable_timing=True)
            # The waiting thread sleeps instead of turning round.
            ended = cuda.Event(enable_timing=True, blocking=True)
            cuda.reset_peak_memory_stats()
            before = self._allocated()["current"]
            began.record()
            outputs = _to_host(compute())
            ended.record()
            peak = self._allocated()["peak"] - before
        return CudaLaunch(
            outputs=outputs,
            seconds=0.0,
            peak=peak,
            host_seconds=monotonic() - start,
            is_done=False,
            began=began,
            ended=ended,
        )

    def _allocated(self) -> Any:
        """Bytes in use now, as `current`, and at most, as `peak`. `memory_allocated` makes a dictionary of hundreds."""
        return _torch().cuda.memory_stats_as_nested_dict(self._numbered)["allocated_bytes"]["all"]

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Copies of weights don't stand in the way of batches, and are over when the block is."""
        cuda, stream = _torch().cuda, self._loading_stream
        # Weights can be larger than their files, and then others leave for them, once that is known.
        self._set_loading(True)
        try:
            # Memory of evicted weights is used again here, and a batch that nobody waits for may still read it.
            stream.wait_stream(cuda.current_stream(self._numbered))
            with cuda.stream(stream):
                yield
            stream.synchronize()
        finally:
            self._set_loading(False)

    @functools.cached_property
    def _loading_stream(self) -> Any:
        """One for good: the allocator gives memory of one model's weights to the next only on the same stream."""
        return _torch().cuda.Stream(self._numbered)

    def hold(self, limit: int | None) -> None:
        """Torch's allocator gives back what it keeps for later before it has more; if that is not enough, it raises."""
        with self._holding:
            self._limit = limit
            self._hold()

    def _set_loading(self, is_loading: bool) -> None:
        with self._holding:
            self._is_loading = is_loading
            self._hold()

    def _hold(self) -> None:
        cuda = started_cuda()
        if cuda is None:
            return
        share = 1.0
        if self._limit is not None and not self._is_loading:
            share = min(1.0, self._limit / cuda.get_device_properties(self._numbered).total_memory)
        with suppress(RuntimeError):  # of a broken context, which the next batch will tell
            cuda.set_per_process_memory_fraction(share, self._numbered)

    def taken(self) -> int:
        """Bytes that torch's allocator has of the GPU, in use or kept."""
        cuda = started_cuda()
        return 0 if cuda is None else int(cuda.memory_reserved(self._numbered))

    def is_lost(self, error: BaseException) -> bool:
        """Whether the error broke the process's context, as an illegal address or a failed assertion in a kernel does.

        CUDA then answers every later call with that error, and so the next one is asked.
        """
        cuda = started_cuda()
        if cuda is None or not isinstance(error, RuntimeError):
            return False
        try:
            cuda.synchronize(self._numbered)
        except RuntimeError:
            return True
        return False


def _torch() -> Any:
    import torch

    return torch


@dataclass(eq=False, kw_only=True)
class CudaLaunch(Launch):
    """A batch that the GPU may still be at. Waited for by the waiter thread, which touches no tensor."""

    began: Any
    ended: Any

    def wait(self) -> None:
        """Sleeps without the interpreter lock."""
        try:
            self.ended.synchronize()
            self.seconds = self.began.elapsed_time(self.ended) / 1000
        except Exception as error:
            self.error = error
        finally:
            self.is_done = True


def to_device(features: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """A batch's tensors on `device`; what is no tensor as it is.

    To a GPU by way of pinned memory, from which the copy needs nobody's attention; torch keeps such memory until the
    copy is over, and for the next one.
    """
    import torch

    by_pinned = device.type == "cuda"

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.pin_memory().to(device, non_blocking=True) if by_pinned else value.to(device)

    return {name: move(value) for name, value in features.items()}


def _to_host(outputs: Any) -> Any:
    """Tensors of a GPU, alone or in a list, as tensors in pinned memory that will have their values; others as is."""
    import torch

    if isinstance(outputs, list | tuple):
        return [_to_host(output) for output in outputs]
    if not isinstance(outputs, torch.Tensor) or outputs.device.type != "cuda":
        return outputs
    host = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=True)
    return host.copy_(outputs, non_blocking=True)


def move(module: Any, device: str) -> None:
    """Put a `torch.nn.Module` on `device`.

    Between the host and a GPU, part by part through a little pinned memory: while the driver is at a copy of memory
    that is not pinned, it takes no launch, and torch's `to` copies whole tensors so.
    """
    import torch

    there = torch.device(device)
    if there.type == "cuda" or any(tensor.device.type == "cuda" for tensor in module.parameters()):
        pinned = torch.empty(PART, dtype=torch.uint8, pin_memory=True)
        # As `to` does it, which sees tensors that two modules share twice.
        module._apply(lambda tensor: tensor if tensor.device.type == there.type else copied(tensor, there, pinned))
    module.to(device)


def copied(tensor: Any, device: Any, pinned: Any) -> Any:
    """A tensor's values on `device`, as many at once as have room in the bytes of `pinned`."""
    import torch

    if not tensor.is_contiguous():
        return tensor.to(device)
    new = torch.empty_like(tensor, device=device)
    source, target = tensor.detach().view(-1), new.view(-1)
    each = pinned.numel() // tensor.element_size()
    for begin in range(0, source.numel(), each):
        part = source[begin : begin + each]
        room = pinned[: part.numel() * part.element_size()].view(part.dtype)
        room.copy_(part, non_blocking=True)
        _finish(tensor)
        target[begin : begin + each].copy_(room, non_blocking=True)
        _finish(new)
    return new


def _finish(tensor: Any) -> None:
    """Wait for the copies from and to this tensor, where it is on a GPU."""
    if tensor.device.type == "cuda":
        _torch().cuda.current_stream(tensor.device).synchronize()


@contextmanager
def tf32() -> Iterator[None]:
    """Within the block, factors of float32 products are rounded to TF32, 10 bits of mantissa: several times as fast.

    For the whole process: one batch is launched at a time.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
