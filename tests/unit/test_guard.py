"""A process that may not touch CUDA can't, and the error names the line that tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = "from celery import Celery\nimport legit_worker\nlegit_worker.install(Celery(set_as_current=False))\n"

#: Each would start CUDA, or load its driver, where there is a device.
ATTEMPTS = {
    "device properties": "import torch\ntorch.cuda.get_device_properties(0)",
    "to": "import torch\ntorch.zeros(1).to('cuda')",
    "device=": "import torch\ntorch.zeros(1, device='cuda:0')",
    "init": "import torch\ntorch.cuda.init()",
    "memory": "import torch\ntorch.cuda.mem_get_info()",
    "a submodule's own import": "import torch\ntorch.cuda.get_rng_state()",
    "current_device": "import torch\ntorch.cuda.current_device()",
    "imported by name": "from torch.cuda import get_device_name\nget_device_name()",
    "ctypes": "import ctypes\nctypes.CDLL('libcuda.so.1')",
    "ctypes, runtime": "import ctypes\nctypes.CDLL('/usr/local/cuda/lib64/libcudart.so')",
}


def run(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of its own, in a process of its own."""
    script = folder / "asks.py"
    script.write_text(code)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LEGIT_", "CUDA_"))}
    kept["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, str(script)], env=kept | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_is_refused_with_the_line_that_made_it(tmp_path: Path, attempt: str) -> None:
    code = INSTALL + ATTEMPTS[attempt]
    finished = run(tmp_path, code, LEGIT_WORKER_ROLE="prep")
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("legit_worker.errors.CudaForbiddenError")
    assert f"by asks.py:{len(code.splitlines())} " in last


def test_a_torch_that_was_imported_first_refuses_too(tmp_path: Path) -> None:
    finished = run(tmp_path, "import torch\n" + INSTALL + "torch.zeros(1).to('cuda')", LEGIT_WORKER_ROLE="prep")
    assert "CudaForbiddenError: torch was asked to start CUDA by asks.py:5" in finished.stderr


def test_cpu_work_goes_on_and_no_device_is_seen(tmp_path: Path) -> None:
    asks = "import torch\nprint(torch.cuda.is_available(), torch.cuda.device_count(), torch.ones(2).sum().item())"
    finished = run(tmp_path, INSTALL + asks, LEGIT_WORKER_ROLE="prep")
    assert finished.stdout.split() == ["False", "0", "2.0"], finished.stderr


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_children_see_no_device(tmp_path: Path, way: str) -> None:
    code = f"""
import multiprocessing, os
def ask(queue):
    queue.put(os.environ.get("CUDA_VISIBLE_DEVICES"))
if __name__ == "__main__":
    {INSTALL.replace(chr(10), chr(10) + "    ")}
    context = multiprocessing.get_context("{way}")
    queue = context.Queue()
    child = context.Process(target=ask, args=(queue,))
    child.start()
    print(repr(queue.get(timeout=30)))
    child.join()
"""
    finished = run(tmp_path, code, LEGIT_WORKER_ROLE="prep", CUDA_VISIBLE_DEVICES="0,1")
    assert finished.stdout.strip() == "''", finished.stderr


@pytest.mark.parametrize("variables", [{}, {"LEGIT_WORKER_ROLE": "prep", "LEGIT_WORKER_ENABLED": "0"}])
def test_without_the_role_nothing_is_changed(tmp_path: Path, variables: dict[str, str]) -> None:
    asks = "import os, sys, torch\nprint(os.environ['CUDA_VISIBLE_DEVICES'], torch.cuda._lazy_init.__module__)"
    finished = run(tmp_path, INSTALL + asks, CUDA_VISIBLE_DEVICES="1", **variables)
    assert finished.stdout.split() == ["1", "torch.cuda"], finished.stderr
