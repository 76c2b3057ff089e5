"""What the allocator does while batches are computed, counted by the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: Adds large tensors as a layer's activations are, and prints the page faults of ten rounds after five that warm up.
CODE = """
import resource, sys, torch
from legit_worker.device.host import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
def layers():
    blocks = [torch.ones(1024, 1024) + 1 for _ in range(8)]
    return sum(block.sum() for block in blocks)
for _ in range(5):
    layers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", CODE, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is set")
def test_memory_that_a_batch_freed_is_used_again_by_the_next() -> None:
    assert faults("kept") < faults("default") / 5
