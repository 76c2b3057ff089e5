"""The memory of GPUs, by NVML, which opens no CUDA context. The only module that imports pynvml.

In: the environment, as CUDA would read it. Out: the GPUs that CUDA would show, in its order, and the bytes that each
has and has left. What can't be known is a `VramUnknownError` with the reason and the way out.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from legit_worker.errors import LegitWorkerError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What each of NVML's errors means for an operator, by the name of pynvml's class for it.
REASONS = {
    "NVMLError_LibraryNotFound": "libnvidia-ml.so.1 is not there: the machine lacks an NVIDIA driver, or the "
    "container lacks the `utility` capability",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is not loaded",
    "NVMLError_LibRmVersionMismatch": "the driver and its library are of different versions, as after an update: "
    "reboot, or start the container anew",
    "NVMLError_NoPermission": "this user may not ask the driver: look at the permissions of /dev/nvidia*",
    "NVMLError_GpuIsLost": "the GPU is lost, has fallen off the bus: look at the kernel's log, and reset or reboot",
}

#: What helps in every case.
WAY_OUT = "Set LEGIT_WORKER_VRAM_LIMIT to bytes to go on without asking, or LEGIT_WORKER_DEVICE=cpu"

#: Seconds for which a worker waits for another that loads, and between two tries.
TURN_SECONDS, TURN_LOOK = 300.0, 0.05

#: The process in which NVML was started, which a forked child must do again.
_started_in = 0


class VramUnknownError(LegitWorkerError):
    """The memory of a GPU can't be read; the message says why, and what to set instead."""


class NvmlMuteError(VramUnknownError):
    """NVML itself tells nothing."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one MIG instance of it."""

    #: In full: `GPU-…` or `MIG-…`.
    uuid: str
    name: str
    #: NVML's index of the physical GPU: the order of PCI addresses.
    index: int


@dataclass(frozen=True)
class Memory:
    """Of one GPU or instance, in bytes."""

    total: int
    free: int
    #: Of the processes that were asked about; None if NVML does not tell, as in many containers.
    mine: int | None

    @property
    def used(self) -> int:
        """By all, the driver's own part included."""
        return self.total - self.free


def visible_gpus(environ: Mapping[str, str] | None = None) -> tuple[Gpu, ...]:
    """What CUDA would show a process with this environment: the N-th is torch's `cuda:N`.

    `CUDA_VISIBLE_DEVICES` is read as NVIDIA's CUDA programming guide has it: indices, unambiguous beginnings of UUIDs,
    MIG UUIDs; the list ends before the first entry that names nothing, or something again. Of a GPU that MIG splits,
    CUDA shows one instance. Indices are in the order of PCI addresses, which is CUDA's if `CUDA_DEVICE_ORDER` is
    `PCI_BUS_ID` or all GPUs are alike: see `is_order_known`. Raises `VramUnknownError`.
    """
    environ = os.environ if environ is None else environ
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = all_gpus()
    physical = [_first(gpus, index) for index in sorted({gpu.index for gpu in gpus})]
    if listed is None:
        return tuple(physical)
    chosen: list[Gpu] = []
    for entry in listed.split(","):
        gpu = _named(entry.strip(), gpus, physical)
        if gpu is None or gpu in chosen:
            break
        chosen.append(gpu)
    return tuple(chosen)


def is_order_known(gpus: Collection[Gpu], environ: Mapping[str, str] | None = None) -> bool:
    """Whether CUDA counts these GPUs as NVML does. By default it puts the fastest first."""
    environ = os.environ if environ is None else environ
    by_uuid = not any(entry.strip().isdigit() for entry in environ.get("CUDA_VISIBLE_DEVICES", "0").split(","))
    return by_uuid or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) < 2


def all_gpus() -> tuple[Gpu, ...]:
    """Every GPU of the machine; in place of one that is split by MIG, its instances. Raises `VramUnknownError`.

    One that NVML can't reach is left out, as CUDA leaves it out, and the log says so.
    """

    def read(nvml: Any) -> tuple[Gpu, ...]:
        found: list[Gpu] = []
        lost: list[Exception] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                found += _gpus(nvml, index)
            except nvml.NVMLError as error:  # noqa: PERF203
                lost.append(error)
                logger.warning("GPU %d does not answer, and is left out: %s", index, _reason(error))
        if lost and not found:
            raise lost[0]
        return tuple(found)

    return _ask(read)


def _gpus(nvml: Any, index: int) -> list[Gpu]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    return [Gpu(nvml.nvmlDeviceGetUUID(one), name, index) for one in _instances(nvml, handle) or [handle]]


def memory(gpu: Gpu, pids: Collection[int] | None = None) -> Memory:
    """Of this GPU now; of a MIG instance its own. `pids` defaults to this process. Raises `VramUnknownError`."""
    asked = {os.getpid()} if pids is None else set(pids)

    def read(nvml: Any) -> Memory:
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
        return Memory(total=int(info.total), free=int(info.free), mine=_used_by(nvml, handle, asked))

    return _ask(read)


@contextmanager
def turn(gpu: Gpu, folder: Path | None = None) -> Iterator[None]:
    """Let one worker at a time load onto this GPU: nobody counts on bytes that another is taking.

    Workers meet by a file in `folder`, `LEGIT_WORKER_LOCK_DIR`; None is a folder of this user's own. A worker that has
    waited for `TURN_SECONDS`, or can't have the file, goes on without.
    """
    lock = None
    try:
        # Any user who may write to the folder may have the lock.
        lock = FileLock(_folder(folder) / f"{gpu.uuid}.lock", mode=0o666)
        lock.acquire(timeout=TURN_SECONDS, poll_interval=TURN_LOOK)
    except Timeout:
        logger.warning("another worker has been loading onto %s for %.0f s: going on", gpu.uuid, TURN_SECONDS)
    except (OSError, NotImplementedError) as error:
        logger.warning("workers can't take turns at loading onto %s: %s. Set LEGIT_WORKER_LOCK_DIR", gpu.uuid, error)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _folder(chosen: Path | None) -> Path:
    """The folder, made if it is not there. Raises `OSError`.

    One for all sessions of a user, so not `XDG_RUNTIME_DIR`: a login has it, and a service has not. Other users can
    write to the system's folder for temporary files, and may have made this one before us.
    """
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen
    own = Path(tempfile.gettempdir()) / f"legit_worker-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    seen = own.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o077:
        raise PermissionError(f"{own} is not a folder that this user alone may enter")
    return own


def _used_by(nvml: Any, handle: Any, pids: Collection[int]) -> int | None:
    try:
        used = [one.usedGpuMemory for one in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if one.pid in pids]
    except nvml.NVMLError:  # memory alone is worth having
        return None
    return None if None in used else sum(used)


def _instances(nvml: Any, handle: Any) -> list[Any]:
    """The MIG instances of a GPU; none if it is not split."""
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return []
    found = []
    for index in range(most):
        with suppress(nvml.NVMLError_NotFound):
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return found


def _first(gpus: Collection[Gpu], index: int) -> Gpu:
    return next(gpu for gpu in gpus if gpu.index == index)


def _named(entry: str, gpus: Collection[Gpu], physical: list[Gpu]) -> Gpu | None:
    """What one entry of `CUDA_VISIBLE_DEVICES` stands for."""
    if entry.isdigit():
        return physical[int(entry)] if int(entry) < len(physical) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    return found[0] if len(found) == 1 else None


def _ask(question: Callable[[Any], T]) -> T:
    """Put a question to NVML. Raises `VramUnknownError`."""
    try:
        import pynvml
    except ImportError:
        raise NvmlMuteError(f"free GPU memory is unknown: nvidia-ml-py is not installed. {WAY_OUT}") from None
    try:
        _start(pynvml)
        try:
            return question(pynvml)
        except pynvml.NVMLError_Uninitialized:  # somebody else in this process has shut it down
            _start(pynvml, again=True)
            return question(pynvml)
    except pynvml.NVMLError as error:
        raise NvmlMuteError(f"free GPU memory is unknown: {_reason(error)}. {WAY_OUT}") from error


def _reason(error: Exception) -> str:
    return REASONS.get(type(error).__name__, str(error))


def _start(nvml: Any, *, again: bool = False) -> None:
    global _started_in
    if again or _started_in != os.getpid():
        nvml.nvmlInit()
        _started_in = os.getpid()
