"""A process that may not touch CUDA can't, and the error names the line that tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = "from celery import Celery\nimport legit_worker\nlegit_worker.install(Celery(set_as_current=False))\n"

#: Each would start CUDA, or load its driver, where there is a device.
ATTEMPTS = {
    "device properties": "torch.cuda.get_device_properties(0)",
    "to": "torch.zeros(1).to('cuda')",
    "device=": "torch.zeros(1, device='cuda:0')",
    "init": "torch.cuda.init()",
    "memory": "torch.cuda.mem_get_info()",
    "a submodule's own import": "torch.cuda.get_rng_state()",
    "current_device": "torch.cuda.current_device()",
    "imported by name": "from torch.cuda import get_device_name; get_device_name()",
    "ctypes": "ctypes.CDLL('libcuda.so.1')",
    "ctypes, runtime": "ctypes.CDLL('/usr/local/cuda/lib64/libcudart.so')",
}

#: A function for each, and after them what calls one after the other and prints its error.
ASKS = ["import ctypes, json, torch", *(f"def ask{number}(): {code}" for number, code in enumerate(ATTEMPTS.values()))]
ALL = f"""
for number in range({len(ATTEMPTS)}):
    try:
        globals()["ask%d" % number]()
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
    else:
        print(json.dumps(["nothing", "it was done"]))
"""


def run(folder: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of its own, in a process of its own."""
    script = folder / "asks.py"
    script.write_text(code)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LEGIT_", "CUDA_"))}
    kept["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, str(script)], env=kept | variables, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The errors of all attempts, of one process: torch takes seconds to import."""
    code = INSTALL + "\n".join(ASKS) + ALL
    finished = run(tmp_path_factory.mktemp("asks"), code, LEGIT_WORKER_ROLE="prep")
    assert finished.returncode == 0, finished.stderr
    return dict(zip(ATTEMPTS, map(json.loads, finished.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_is_refused_with_the_line_that_made_it(refusals: dict[str, list[str]], attempt: str) -> None:
    kind, message = refusals[attempt]
    assert kind == "CudaForbiddenError"
    line = INSTALL.count("\n") + 2 + list(ATTEMPTS).index(attempt)
    assert f"by asks.py:{line} " in message


def test_an_attempt_that_nobody_expects_ends_the_program(tmp_path: Path) -> None:
    finished = run(tmp_path, INSTALL + "import ctypes\nctypes.CDLL('libcuda.so.1')", LEGIT_WORKER_ROLE="prep")
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1].startswith("legit_worker.errors.CudaForbiddenError")


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
