"""What running out of memory looks like, and what can be done at once.

In: an exception from a model. Out: whether it says that memory is short, whoever said it.
"""

from __future__ import annotations

from legit_worker.device.loaded import started_cuda
from legit_worker.errors import DeviceOutOfMemoryError

#: torch says so in a `RuntimeError` where it has no class of its own: host memory, cuBLAS, older releases.
WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could have worked."""
    if isinstance(error, MemoryError | DeviceOutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def give_back_cached() -> None:
    """Have torch return the device memory that it keeps for later: blocks of the wrong sizes are of no use to it."""
    cuda = started_cuda()
    if cuda is not None:
        cuda.empty_cache()
