"""With `capture`, the only module that asks torch about CUDA and computes with it.

In: `LEGIT_WORKER_DEVICE`; batches. Out: the device's name; launches that return before the GPU is done, so that the
main thread can run the next task meanwhile.

`tests/gpu` runs it on a GPU, and `tests/unit/test_cuda_device.py` over a fake of torch's functions.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from time import monotonic
from typing import Any

from legit_worker.device.capture import Recorder
from legit_worker.device.devices import Device, Launch
from legit_worker.device.imported import started_cuda
from legit_worker.device.memory import numbered, recording
from legit_worker.device.vram import Gpu, Memory, NvmlMuteError, VramUnknownError, visible_gpus

#: The variable by which torch's allocator lets its blocks grow, and leaves no holes between them. Read at import.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

#: The variable's name from torch 2.9 on, which still reads the old one.
ALLOCATOR_ALSO = "PYTORCH_ALLOC_CONF"

#: The bytes of weights in one copy.
PART = 16 * 2**20

#: How the settings begin that name a GPU by its UUID.
BY_UUID = ("GPU-", "MIG-")


def may_be_gpu(setting: str) -> bool:
    """Tell whether `choose` may choose a GPU."""
    return setting.startswith(("auto", "cuda", *BY_UUID))


def choose(setting: str) -> str:
    """Return torch's name of the device: `cpu`, `simulated`, `cuda` or `cuda:N`.

    `auto` is CUDA if torch is installed and sees a GPU. Raises `VramUnknownError` if there is no GPU of this UUID, or
    torch shows another one in its place.
    """
    if setting.startswith(BY_UUID):
        return _checked(setting, name_of(setting))
    if setting != "auto":
        return setting
    if find_spec("torch") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def name_of(setting: str) -> str:
    """Return torch's name of the GPU that this setting means, without torch. Raises `VramUnknownError`."""
    if setting.startswith(BY_UUID):
        if os.environ.get("CUDA_VISIBLE_DEVICES") == setting:  # it is the only one, also if NVML tells nothing
            return "cuda:0"
        return f"cuda:{visible_gpus().index(_by_uuid(setting))}"
    return "cuda" if setting == "auto" else setting


def _checked(setting: str, name: str) -> str:
    """Return the name if torch's GPU of this name has this UUID. Of a MIG instance torch may not tell."""
    properties = _torch().cuda.get_device_properties(name)
    seen = str(getattr(properties, "uuid", "")).lower()
    if setting.startswith("GPU-") and seen and not seen.startswith(setting.removeprefix("GPU-").lower()):
        raise VramUnknownError(
            f"LEGIT_WORKER_DEVICE={setting}, and torch started CUDA with GPU-{seen} in its place, before the worker "
            f"chose: set CUDA_VISIBLE_DEVICES={setting}, too"
        )
    return name


def gpu(setting: str) -> Gpu | None:
    """Return the GPU that `choose` would choose, by NVML; None if that is the CPU. Opens no context, imports no torch.

    Raises `VramUnknownError`.
    """
    if setting.startswith(BY_UUID):
        return _by_uuid(setting)
    gpus = visible_gpus()
    return None if setting == "auto" and not gpus else _by_number(setting, gpus)


def _by_number(setting: str, gpus: Sequence[Gpu]) -> Gpu:
    """Return the GPU of `auto`, `cuda` or `cuda:N`. Raises `VramUnknownError`."""
    number = int(setting.partition(":")[2] or 0)
    if number >= len(gpus):
        names = ", ".join(f"cuda:{index} is {gpu.uuid}" for index, gpu in enumerate(gpus)) or "none"
        raise VramUnknownError(
            f"LEGIT_WORKER_DEVICE={setting}, and CUDA shows {len(gpus)} GPUs to this process ({names}): name one of "
            "them, or set LEGIT_WORKER_DEVICE=cpu"
        )
    return gpus[number]


def _by_uuid(setting: str, environ: Mapping[str, str] | None = None) -> Gpu:
    """Return the one visible GPU whose UUID begins like this. Raises `VramUnknownError`."""
    gpus = visible_gpus(environ)
    found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(setting.lower())]
    if len(found) != 1:
        names = ", ".join(gpu.uuid for gpu in gpus) or "none"
        raise VramUnknownError(f"LEGIT_WORKER_DEVICE={setting}, and CUDA shows this process: {names}")
    return found[0]


def show_only(setting: str) -> None:
    """Let CUDA show this process and its children the GPU of this UUID alone, and a MIG instance at all.

    CUDA reads the variable once, when it starts. Raises `VramUnknownError` if there is no such GPU, or the operator's
    own `CUDA_VISIBLE_DEVICES` hides it.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not setting.startswith(BY_UUID) or started_cuda() is not None:
        return
    with suppress(NvmlMuteError):
        _by_uuid(setting, {"CUDA_VISIBLE_DEVICES": setting if listed is None else listed})
    os.environ["CUDA_VISIBLE_DEVICES"] = setting


def check_number(setting: str) -> None:
    """Raise `VramUnknownError` for a number, `cuda` or `cuda:N`, that NVML shows no GPU of to this process."""
    if setting.startswith("cuda"):
        with suppress(NvmlMuteError):
            _by_number(setting, visible_gpus())


def prepare_environment() -> None:
    """Let CUDA number GPUs by their PCI addresses, as NVML does, and let the blocks of torch's allocator grow.

    Leaves what the operator chose. Call it before torch is imported.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if ALLOCATOR_ALSO not in os.environ:
        os.environ.setdefault(*ALLOCATOR)


@functools.cache
def cuda_device(name: str) -> CudaDevice:
    """Return this process's one device for `cuda` or `cuda:N`."""
    return CudaDevice(name)


class CudaDevice(Device):
    """A GPU. Batches run on the calling thread's stream, and weights are copied on another stream."""

    tells_memory = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._numbered = numbered(name)
        #: The allocator counts one peak for the process, so the loader's trial batches and the engine's batches take
        #: turns. The lock is re-entrant: a model's `forward` may call another model.
        self._counting = threading.RLock()
        #: Batches as CUDA graphs.
        self.recorder = Recorder(self._numbered, lambda: self._is_loading)
        #: The most bytes for torch's allocator; it does not hold while weights are read.
        self._limit: int | None = None
        self._is_loading = False
        self._holding = threading.Lock()

    def launch(self, compute: Callable[[], Any]) -> Launch:
        """Queue a batch's kernels, and then the copy of its outputs to the host. Raises the errors of `compute`.

        Returns before the GPU is done, unless `compute` itself waits for the GPU.
        """
        cuda = _torch().cuda
        start = monotonic()
        # Events belong to the device that is current when they are recorded.
        with self._counting, cuda.device(self._numbered):
            began = cuda.Event(enable_timing=True)
            # With `blocking`, the waiting thread sleeps instead of spinning.
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
        """Return the bytes in use, as `current`, and the most so far, as `peak`. `memory_allocated` is far slower."""
        return _torch().cuda.memory_stats_as_nested_dict(self._numbered)["allocated_bytes"]["all"]

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Copy weights beside the batches that run. The copies are done at the end of the block."""
        cuda, stream = _torch().cuda, self._loading_stream
        # The limit does not hold meanwhile: weights can be larger than their files, and that is known only now.
        self._set_loading(True)
        try:
            # The copies may use memory of evicted weights, which a running batch may still read.
            stream.wait_stream(cuda.current_stream(self._numbered))
            with cuda.stream(stream):
                yield
            stream.synchronize()
        finally:
            self._set_loading(False)

    @functools.cached_property
    def _loading_stream(self) -> Any:
        """One stream for all loads: the allocator reuses memory only on the stream that it was for."""
        torch = _torch()
        try:
            return torch.cuda.Stream(self._numbered)
        except (RuntimeError, AssertionError) as error:
            count = torch.cuda.device_count()
            if int(self._numbered.partition(":")[2]) < count:
                raise
            raise VramUnknownError(
                f"LEGIT_WORKER_DEVICE is {self.name}, and torch {torch.__version__} sees {count} GPUs: install a torch "
                "that is built for CUDA and for this driver, name another GPU, or set LEGIT_WORKER_DEVICE=cpu"
            ) from error

    def hold(self, limit: int | None) -> None:
        """Bound torch's allocator. At the limit it first gives back the memory that it keeps for later, then raises."""
        with self._holding:
            self._limit = limit
            self._hold()

    def _set_loading(self, is_loading: bool) -> None:
        with recording, self._holding:
            self._is_loading = is_loading
            self._hold()

    def _hold(self) -> None:
        cuda = started_cuda()
        if cuda is None:
            return
        share = 1.0
        if self._limit is not None and not self._is_loading:
            total = cuda.get_device_properties(self._numbered).total_memory
            share = min(1.0, (self._limit + self.recorder.kept) / total)
        with suppress(RuntimeError):  # the context is broken, and the next batch will tell
            cuda.set_per_process_memory_fraction(share, self._numbered)

    def taken(self) -> int:
        """Return the bytes of the GPU that torch's allocator has, in use or kept for later."""
        cuda = started_cuda()
        return 0 if cuda is None else int(cuda.memory_reserved(self._numbered))

    def forget_recordings(self) -> None:
        """Free what CUDA graphs keep, when no batch is launched."""
        with self._counting:
            self.recorder.forget()

    def memory(self) -> Memory | None:
        """Return the GPU's memory as CUDA tells it; None until CUDA runs here, which asking must not start."""
        cuda = started_cuda()
        if cuda is None:
            return None
        try:
            free, total = cuda.mem_get_info(self._numbered)
        except RuntimeError:  # of a broken context, which the next batch will tell
            return None
        return Memory(total=total, free=free, mine=None)

    def is_lost(self, error: BaseException) -> bool:
        """Tell whether the error broke the process's context, as an illegal address in a kernel does.

        CUDA then answers every later call with this error. So this makes such a call.
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
    """A batch that the GPU may still compute. The waiter thread waits for it, and touches no tensor."""

    began: Any
    ended: Any

    def wait(self) -> None:
        """Sleep until the batch is done, without the interpreter lock."""
        try:
            self.ended.synchronize()
            self.seconds = self.began.elapsed_time(self.ended) / 1000
        except Exception as error:
            self.error = error
        finally:
            self.is_done = True


def to_device(features: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Move a batch's tensors to `device`; other values stay as they are.

    To a GPU they go through pinned memory, so that the copy needs no thread. torch keeps this memory until the copy is
    over, and then for the next copy.
    """
    import torch

    by_pinned = device.type == "cuda"

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.pin_memory().to(device, non_blocking=True) if by_pinned else value.to(device)

    return {name: move(value) for name, value in features.items()}


def _to_host(outputs: Any) -> Any:
    """Queue the copy of tensors of a GPU, also in lists and tuples, to pinned memory. Other values stay as they are."""
    import torch

    if isinstance(outputs, list | tuple):
        kind = type(outputs)
        return getattr(kind, "_make", kind)(map(_to_host, outputs))  # named tuples have `_make`
    if not isinstance(outputs, torch.Tensor) or outputs.device.type != "cuda":
        return outputs
    host = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=True)
    return host.copy_(outputs, non_blocking=True)


def move(module: Any, device: str) -> None:
    """Put a `torch.nn.Module` on `device`.

    Between the host and a GPU, the weights go part by part through a little pinned memory. torch's `to` copies whole
    tensors from memory that is not pinned, and the driver takes no launch during such a copy.
    """
    import torch

    there = torch.device(device)
    if there.type == "cuda" or any(tensor.device.type == "cuda" for tensor in module.parameters()):
        pinned = torch.empty(PART, dtype=torch.uint8, pin_memory=True)
        # As `to` does. If two modules share a tensor, this sees it twice.
        module._apply(lambda tensor: tensor if tensor.device.type == there.type else copied(tensor, there, pinned))
    module.to(device)


def copied(tensor: Any, device: Any, pinned: Any) -> Any:
    """Copy a tensor to `device`, in parts of at most the bytes of `pinned`."""
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
    """If this tensor is on a GPU, wait for the copies from it and to it."""
    if tensor.device.type == "cuda":
        _torch().cuda.current_stream(tensor.device).synchronize()


@contextmanager
def tf32() -> Iterator[None]:
    """Round the factors of float32 products to TF32 within the block: 10 bits of mantissa, several times as fast.

    This holds for the whole process, which launches one batch at a time.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
