"""What makes batches on a CPU faster, and keeps their process small: the allocator, oneDNN's kernels, mapped files.

In: this process; memory of a tensor. Out: a process that uses freed memory again, keeps few kernels, and maps what it
does not read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

from legit_worker.device.imported import imported

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


#: Linux's advice for pages that are not needed soon, from its mman-common.h. Those of a file that nobody changed leave
#: memory at once, if this process may write the file and no other process has it mapped.
MADV_PAGEOUT = 21


def mapped_spans() -> list[tuple[int, int]]:
    """Return where files are mapped into memory: first address, and the one after the last. None if nobody tells."""
    spans = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, _, inode, *_ = line.split()
            if inode != "0":
                begin, end = span.split("-")
                spans.append((int(begin, 16), int(end, 16)))
    return spans


def page_out(address: int, size: int) -> None:
    """Ask the system to let these bytes of a mapped file leave memory until somebody reads them."""
    begin, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


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
