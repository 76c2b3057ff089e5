"""How to tell that memory ran out, and how to free some at once.

In: an exception from a model. Out: whether it says that memory is short.
"""

from __future__ import annotations

from legit_worker.device.imported import started_cuda
from legit_worker.errors import DeviceOutOfMemoryError

#: torch raises a `RuntimeError` with these words if it has no class of its own: host memory, cuBLAS, older releases.
WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a smaller batch could have worked."""
    if isinstance(error, MemoryError | DeviceOutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def give_back_cached() -> None:
    """Let torch return the device memory that it keeps for later, since kept blocks may have the wrong sizes."""
    cuda = started_cuda()
    if cuda is not None:
        cuda.empty_cache()
