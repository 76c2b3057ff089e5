"""What is done for batches on a CPU: the allocator's page faults, counted by the kernel, and linear layers."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from legit_worker.device import cpu

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is set")
def test_memory_that_a_batch_freed_is_used_again_by_the_next() -> None:
    assert faults("kept") < faults("default") / 5


def layers() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8, bias=False)).eval()


@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (3, 5, 64)], ids=str)
@torch.inference_mode()
def test_layers_that_go_through_onednn_give_what_they_gave(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "WORTH_IT", 0.0)
    model, rows = layers(), torch.randn(shape)
    expected = model(rows)
    monkeypatch.setattr(cpu, "TRIAL_ROWS", (4,))
    assert cpu.speed_up_linear_layers(model) == 4
    assert all("forward" in vars(layer) for layer in model if isinstance(layer, torch.nn.Linear))
    torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-5)


def test_where_it_is_not_faster_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WORTH_IT", float("inf"))
    model = layers()
    assert cpu.speed_up_linear_layers(model) is None
    assert not any("forward" in vars(layer) for layer in model)


def test_other_dtypes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WORTH_IT", 0.0)
    model = layers().to(torch.bfloat16)
    assert cpu.speed_up_linear_layers(model) is None
