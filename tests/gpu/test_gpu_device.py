"""`CudaDevice` and NVML on a real GPU: what `tests/unit/test_cuda_device.py` shows over a fake of torch's calls."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from legit_worker.device import vram
from legit_worker.device.cuda import CudaDevice, move, tf32, to_device
from legit_worker.device.memory import give_back_cached, is_out_of_memory

MIB = 2**20

#: Kernels that take long, in clock cycles: about a quarter of a second.
LONG = 400_000_000


@pytest.fixture
def device() -> CudaDevice:
    """The first GPU, warm: the first launch of a process compiles and loads."""
    device = CudaDevice("cuda:0")
    device.launch(lambda: torch.ones(1, device="cuda:0") * 2).wait()
    return device


def test_a_launch_returns_before_the_gpu_is_done_and_has_its_outputs_afterwards(device: CudaDevice) -> None:
    def compute() -> torch.Tensor:
        numbers = torch.arange(6.0, device="cuda:0").reshape(3, 2)
        torch.cuda._sleep(LONG)
        return numbers * 2

    device.launch(compute).wait()
    start = time.monotonic()
    launch = device.launch(compute)
    launched = time.monotonic() - start
    assert not launch.is_done
    assert not launch.ended.query()
    launch.wait()
    took = time.monotonic() - start
    assert launched < took / 10
    assert launch.seconds == pytest.approx(took, rel=0.3)
    assert launch.outputs.is_pinned()
    assert launch.outputs.tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]


def test_no_launch_gets_anothers_outputs_or_inputs(device: CudaDevice) -> None:
    """Pinned memory is used again, and must not be before its copy is over."""

    def compute(number: int) -> torch.Tensor:
        features = to_device({"x": torch.full((1000, 100), float(number))}, torch.device("cuda:0"))
        torch.cuda._sleep(LONG // 2000)
        return features["x"] + 1

    launches = [device.launch(lambda number=number: compute(number)) for number in range(300)]
    outputs = []
    for launch in launches:
        launch.wait()
        outputs.append(launch.outputs.unique().tolist())
    assert outputs == [[number + 1.0] for number in range(300)]


def test_a_launch_knows_what_it_took_beside_what_was_there(device: CudaDevice) -> None:
    kept = torch.ones(100 * MIB // 4, device="cuda:0")
    launch = device.launch(lambda: (torch.ones(50 * MIB // 4, device="cuda:0") * 2)[:1])
    launch.wait()
    assert launch.peak == pytest.approx(100 * MIB, rel=0.05)
    assert device.taken() >= 100 * MIB
    del kept


def test_running_out_of_memory_is_known_as_that_and_breaks_nothing(device: CudaDevice) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(torch.OutOfMemoryError) as caught:
        device.launch(lambda: torch.empty(2 * total, dtype=torch.uint8, device="cuda:0"))
    assert is_out_of_memory(caught.value)
    assert not device.is_lost(caught.value)
    with pytest.raises(RuntimeError) as other:
        device.launch(lambda: torch.ones(2, device="cuda:0") @ torch.ones(3, device="cuda:0"))
    assert not is_out_of_memory(other.value)
    assert not device.is_lost(other.value)


@pytest.fixture
def large() -> torch.nn.Module:
    """One tensor of 512 MiB, in the host's memory."""
    return torch.nn.Linear(1024, 512 * MIB // 4 // 1024, bias=False)


def test_batches_go_on_beside_a_load(device: CudaDevice, large: torch.nn.Module) -> None:
    """On a stream of its own, and in parts: neither waits for the other's share of the GPU's time."""

    def batch() -> float:
        start = time.monotonic()
        device.launch(lambda: torch.cuda._sleep(LONG // 50)).wait()
        return time.monotonic() - start

    def beside(load: Callable[[], object]) -> list[float]:
        begun, loaded = threading.Event(), threading.Event()

        def run() -> None:
            with device.loading():
                begun.set()
                for _ in range(5):
                    load()
            loaded.set()

        loader = threading.Thread(target=run)
        loader.start()
        assert begun.wait(10)
        found = []
        while not loaded.is_set():
            found.append(batch())
        loader.join()
        assert len(found) > 3, "the load was over at once: this shows nothing"
        return sorted(found)

    def ours() -> None:
        move(large, "cuda:0")
        move(large, "cpu")

    def torchs() -> None:
        large.to("cuda:0")
        large.to("cpu")

    alone = sorted(batch() for _ in range(50))
    whole, parts = beside(torchs), beside(ours)
    for name, found in {"alone": alone, "beside torch's to": whole, "beside move": parts}.items():
        print(f"{name}: median {1000 * statistics.median(found):.1f} ms, max {1000 * found[-1]:.1f}, of {len(found)}")
    assert statistics.median(parts) < 2 * statistics.median(alone)


def test_weights_are_what_they_were_after_moves(large: torch.nn.Module) -> None:
    before = large.weight.detach().clone()
    for half in (large, large.half()):
        expected = before.to(half.weight.dtype)
        move(half, "cuda:0")
        assert half.weight.device.type == "cuda"
        assert torch.equal(half.weight.cpu(), expected)
        move(half, "cpu")
        assert torch.equal(half.weight, expected)


def test_the_allocator_gives_back_what_it_keeps_before_it_has_more_than_the_limit(device: CudaDevice) -> None:
    give_back_cached()
    kept = [torch.ones(64 * MIB // 4, device="cuda:0") for _ in range(8)]
    del kept
    assert device.taken() >= 512 * MIB
    try:
        device.hold(600 * MIB)
        taken = torch.ones(400 * MIB // 4, device="cuda:0")
        assert device.taken() <= 600 * MIB
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(300 * MIB // 4, device="cuda:0")
        with device.loading():
            torch.ones(300 * MIB // 4, device="cuda:0")
        del taken
    finally:
        device.hold(None)
        give_back_cached()


def test_nvml_tells_what_torch_takes() -> None:
    (gpu, *_) = vram.visible_gpus()
    give_back_cached()
    torch.ones(1, device="cuda:0")
    before = vram.memory(gpu)
    held = torch.empty(1024 * MIB, dtype=torch.uint8, device="cuda:0")
    after = vram.memory(gpu)
    assert before.free - after.free == pytest.approx(1024 * MIB, rel=0.02)
    if after.mine is not None and before.mine is not None:
        assert after.mine - before.mine == pytest.approx(1024 * MIB, rel=0.02)
    free, total = torch.cuda.mem_get_info(0)
    assert after.total == pytest.approx(total, rel=0.02)
    assert after.free == pytest.approx(free, rel=0.02)
    del held
    give_back_cached()
    assert vram.memory(gpu).free == pytest.approx(before.free, rel=0.02)


def test_nvml_and_torch_name_the_same_gpus() -> None:
    ours = [gpu.uuid.removeprefix("GPU-") for gpu in vram.visible_gpus()]
    assert ours == [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def test_tf32_is_for_its_block_only() -> None:
    left, right = (torch.randn(1024, 1024, device="cuda:0") for _ in range(2))
    exact = (left.double() @ right.double()).float()

    def error() -> float:
        return float((left @ right - exact).abs().max())

    full = error()
    with tf32():
        rounded = error()
    assert rounded > 10 * full
    assert error() == full


BREAKS = """
import torch
from legit_worker.device.cuda import CudaDevice
device = CudaDevice("cuda:0")
def compute():
    numbers = torch.ones(4, device="cuda:0")
    return numbers[torch.tensor([9], device="cuda:0")]
launch = device.launch(compute)
launch.wait()
print(launch.is_done, type(launch.error).__name__, device.is_lost(launch.error), flush=True)
import os
os._exit(0)  # what frees tensors now, aborts
"""


def test_a_failed_assertion_in_a_kernel_loses_the_device() -> None:
    assert run(BREAKS).split() == ["True", "AcceleratorError", "True"]


GROWS = """
from legit_worker.device import cuda
cuda.prepare_environment()
import torch
torch.ones(10_000_000, device="cuda:0")
print(all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""


def test_blocks_of_the_allocator_grow() -> None:
    assert run(GROWS).split() == ["True"]


def run(code: str) -> Any:
    """What a program of its own prints."""
    finished = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
