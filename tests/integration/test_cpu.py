"""What is done for a process that computes on a CPU: its page faults, kernels, and pages that leave memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from legit_worker.device import cpu

only_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is set")
only_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="read from /proc")

#: Adds large tensors as a layer's activations are, and prints the page faults of ten rounds: of the best ten in forty,
#: since a heap still grows now and then.
CODE = """
import resource, sys, torch
from legit_worker.device.cpu import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
def layers():
    blocks = [torch.ones(1024, 1024) + 1 for _ in range(8)]
    return sum(block.sum() for block in blocks)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        layers()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(4)))
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", CODE, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@only_glibc
def test_memory_that_a_batch_freed_is_used_again_by_the_next() -> None:
    assert faults("kept") < faults("default") / 5


#: Eight threads that have memory at once; glibc then tells of its heaps.
THREADS = """
import ctypes, sys, threading
from legit_worker.device.cpu import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.fopen.restype = libc.malloc.restype = ctypes.c_void_p
meet = threading.Barrier(9)
def take():
    libc.malloc(100_000)
    meet.wait()
    meet.wait()
for _ in range(8):
    threading.Thread(target=take).start()
meet.wait()
stdout = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, stdout)
libc.fclose(stdout)
meet.wait()
"""


@only_glibc
@pytest.mark.parametrize(
    ("mode", "variables", "least", "most"),
    [("default", {}, 4, 9), ("kept", {}, 2, 2), ("kept", {"MALLOC_ARENA_MAX": "4"}, 4, 4)],
)
def test_threads_share_a_heap_unless_the_operator_says_how_many(
    mode: str, variables: dict[str, str], least: int, most: int
) -> None:
    """What a load freed in its thread's own heap would serve no later load: each may be another thread."""
    plain = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", THREADS, mode]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=plain | variables)
    assert least <= told.stdout.count("<heap nr=") <= most, told.stdout


#: Bytes of the process that no file backs: `Anonymous` of /proc/self/smaps_rollup. What processes share is not in it.
OWN = """
def own():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
"""

#: 20,000 short texts of random lengths by oneDNN, in batches of random sizes; prints the growth after the first 4,000.
#: The worker is made and not started: that needs no broker, and sets what a worker sets for its process.
SHORT_TEXTS = """
import random
from legit_worker.celery import app
from legit_worker.device import linear
from legit_worker.models.registry import default_registry
app.Worker(pool="solo")
linear.WORTH_IT = linear.NO_LOSS = 0.0
entry = default_registry().get("tiny")
model = default_registry().residency.request(entry).future.result()
def compute(texts):
    while texts > 0:
        batch = ["a" + " b" * random.randint(0, 21) for _ in range(random.randint(1, 48))]
        model.compute([model.preprocess(text) for text in batch])
        texts -= len(batch)
random.seed(1)
compute(4_000)
before = own()
compute(16_000)
print(own() - before)
"""

#: A load that frees 64 MiB in small blocks, below one that stays; prints the growth that is left of it.
LOAD = """
import legit_worker
class Messy:
    def load(self, device):
        blocks = [bytearray(4096) for _ in range(16_384)]
        self.kept = bytearray(4096)
    def preprocess(self, item): return item
    def cost(self, item): return 1
    def forward(self, batch): return batch
    def postprocess(self, output): return output
legit_worker.model("other").map([1])
before = own()
legit_worker.model("messy").map([1])
print(own() - before)
"""

MIB = 2**20


def growth(code: str, **models: str) -> int:
    """Bytes that a program prints, which has these models, `{alias}__{setting}`, and one thread to compute with."""
    variables = {f"LEGIT_WORKER_MODELS__{name.upper()}": value for name, value in models.items()}
    environment = os.environ | variables | {"LEGIT_WORKER_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OWN + code]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@only_linux
def test_memory_does_not_grow_with_the_shapes_of_batches(tiny_paths: dict[str, Path]) -> None:
    assert growth(SHORT_TEXTS, tiny__kind="embed", tiny__path=str(tiny_paths["embed"])) < 50 * MIB


@only_linux
@only_glibc
def test_what_a_load_frees_is_given_back() -> None:
    assert growth(LOAD, other__kind="simulated", messy__kind="__main__:Messy") < 16 * MIB


#: A child that is forked between two calls prints whether it gets what its parent got.
FORKED = """
import os, signal
import legit_worker
texts = ["the old dog " * 20] * 200
expected = legit_worker.model("tiny").encode(texts)
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = legit_worker.model("tiny").encode(texts)
    os._exit(0 if abs(found - expected).max() < 1e-4 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_does_not_wait_for_its_parents_threads(tiny_paths: dict[str, Path]) -> None:
    tiny = {"LEGIT_WORKER_MODELS__TINY__PATH": str(tiny_paths["embed"]), "LEGIT_WORKER_DEVICE": "cpu"}
    environment = os.environ | tiny | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FORKED]
    assert int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout) == 0


@only_linux
def test_pages_of_a_file_that_leave_memory_are_there_again_when_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 64 * 1024)
    mapped = torch.from_file(str(tmp_path / "weights"), size=16 * 2**20, dtype=torch.uint8)
    begin, total = mapped.data_ptr(), int(mapped.sum())
    before = resident()
    assert any(first <= begin < last for first, last in cpu.mapped_spans())
    cpu.page_out(begin, mapped.numel())
    assert resident() < before - 12 * 2**20
    assert int(mapped.sum()) == total


def test_memory_that_no_file_backs_keeps_what_it_has() -> None:
    numbers = torch.arange(2**20)
    assert not any(first <= numbers.data_ptr() < last for first, last in cpu.mapped_spans())
    cpu.page_out(numbers.data_ptr() + 3, 5)  # less than a page
    cpu.page_out(numbers.data_ptr(), numbers.numel() * 8)
    assert torch.equal(numbers, torch.arange(2**20))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
