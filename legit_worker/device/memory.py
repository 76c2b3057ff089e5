"""How to tell that memory ran out, and how to free some at once.

In: an exception from a model. Out: whether it says that memory is short; what its frames had is free.
"""

from __future__ import annotations

import threading
import traceback

from legit_worker.device.imported import started_cuda
from legit_worker.errors import DeviceOutOfMemoryError, said

#: torch raises a `RuntimeError` with these words if it has no class of its own: host memory, cuBLAS, older releases.
WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a smaller batch could have worked."""
    if isinstance(error, MemoryError | DeviceOutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in said(error) for word in WORDS)


#: Held while a CUDA graph is recorded: torch's allocator must give no memory back then.
recording = threading.RLock()


def numbered(device: str) -> str:
    """Return a GPU's name with a number: without one, torch uses the current GPU, which a task may have changed."""
    return device if ":" in device else f"{device}:0"


def give_back_cached(device: str = "cuda") -> None:
    """Let torch return the device memory that it keeps for later, since kept blocks may have the wrong sizes.

    `device`: the name of the GPU that computes. Before torch unmaps memory, it waits for the current GPU alone.
    """
    cuda = started_cuda()
    if cuda is not None and device.startswith("cuda"):
        with recording, cuda.device(numbered(device)):
            cuda.empty_cache()


def let_go(error: BaseException) -> None:
    """Free what the frames have that raised an error, and the errors that it came from.

    An error that is kept would otherwise keep the tensors of the code that raised it.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += one.__cause__, one.__context__
