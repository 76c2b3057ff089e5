"""`celery legit doctor` through the real command: what is well, what is not, and what to do."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from drivers import CudaDriver, Nvml, torch_has_cuda
from harness import ANSWER_SECONDS, Broker, celery_command, project_environment

GIB = 2**30

HEALTHY = ("settings", "versions", "broker", "results", "models", "gpu", "prep", "batches")


def doctor(broker: Broker, project: str = "legit_worker", **variables: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings."""
    finished = subprocess.run(
        celery_command(project, "legit", "doctor", "--json"),
        env=project_environment(broker, variables),
        capture_output=True,
        text=True,
        timeout=3 * ANSWER_SECONDS,
        check=False,
    )
    assert finished.stdout, finished.stderr
    return finished.returncode, json.loads(finished.stdout)


def about(found: list[dict[str, Any]], check: str, level: str) -> str:
    """All that was seen at this level by one check."""
    return "\n".join(one["seen"] + one["fix"] for one in found if (one["about"], one["level"]) == (check, level))


@pytest.fixture
def model(tiny_paths: dict[str, Path]) -> dict[str, str]:
    """The variable of a small model."""
    return {"LEGIT_WORKER_MODELS__TINY__PATH": str(tiny_paths["embed"])}


def test_a_machine_without_a_gpu_is_well_and_its_prep_role_asks_no_driver(
    broker: Broker, model: dict[str, str], tmp_path: Path
) -> None:
    driver = CudaDriver.build(tmp_path)
    # The doctor itself asks a torch that is built for CUDA.
    code, found = doctor(broker, **model, **({} if torch_has_cuda() else driver.environment))
    assert code == 0, found
    assert [check for check in HEALTHY if about(found, check, "ok")] == list(HEALTHY)
    assert "tokenizing" in about(found, "prep", "ok")
    assert "refused when it asks" in about(found, "prep", "ok")
    assert "worst cosine between the two 1.000000" in about(found, "batches", "ok")
    assert driver.calls == []


def test_a_model_of_each_built_in_kind_is_tried(broker: Broker, tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    paths = {**tiny_paths, "multi": tiny_models.build_multi(tmp_path)}
    variables = {f"LEGIT_WORKER_MODELS__{kind.upper()}__PATH": str(path) for kind, path in paths.items()}
    variables |= {f"LEGIT_WORKER_MODELS__{kind.upper()}__KIND": kind for kind in paths}
    variables |= {"LEGIT_WORKER_MODELS__EMBED__PRECISION": "int8", "LEGIT_WORKER_MODELS__HOLLOW__KIND": "rerank"}
    code, found = doctor(broker, **variables, LEGIT_WORKER_MODELS__HOLLOW__PATH=str(tmp_path))
    assert code == 1
    assert "model 'hollow' (kind rerank" in about(found, "batches", "failure")
    assert len(about(found, "batches", "ok").splitlines()) == len(paths)
    assert all("the two 1.000000" in line for line in about(found, "batches", "ok").splitlines())


def test_rabbitmq_is_to_confirm_what_tasks_send(rabbitmq: Broker) -> None:
    code, found = doctor(rabbitmq)
    assert code == 0, found
    assert "confirm_publish" in about(found, "broker", "warning")


def test_what_is_wrong_is_named_with_its_fix(broker: Broker) -> None:
    code, found = doctor(broker, "project", LEGIT_WORKER_WINDOW="many")
    assert code == 1
    assert "LEGIT_WORKER_WINDOW='many'" in about(found, "settings", "failure")
    app = {
        "LEGIT_WORKER_APPS__SHOP__RESULT_ROUTING": "on",
        "LEGIT_WORKER_APPS__SHOP__URL": "redis://:pass@localhost:1/7",
    }
    alias = {"LEGIT_WORKER_TASKS__RERANK": '{"rank": {"passage": "document"}}'}
    code, found = doctor(broker, **app, **alias, CELERY_BROKER_URL="redis://localhost:1/0")
    assert code == 1
    assert "localhost:1/0 does not answer" in about(found, "broker", "failure")
    assert "redis://:**@localhost:1/7, for the results of app shop, does not answer" in about(
        found, "results", "failure"
    )
    assert "did you mean documents?" in about(found, "settings", "failure")
    code, found = doctor(broker, LEGIT_WORKER_MODELS__GONE__PATH="/nowhere/model")
    assert code == 1
    assert "/nowhere/model is neither a folder" in about(found, "models", "warning")
    assert about(found, "batches", "failure")


def test_nvml_and_torch_are_compared(broker: Broker, tmp_path: Path) -> None:
    """The stub's GPU is one that torch, built for the CPU, can't see."""
    nvml = Nvml.build(tmp_path)
    world = f"gpu GPU-aaaa-1111 H100 {80 * GIB} {GIB}\n"
    code, found = doctor(broker, **nvml.environment(world))
    assert code == 1
    assert "cuda:0 is H100 GPU-aaaa-1111: 84,825,604,096 of 85,899,345,920 bytes are free" in about(found, "gpu", "ok")
    assert "and NVML ['aaaa-1111']" in about(found, "gpu", "failure")
    code, found = doctor(broker, LEGIT_WORKER_DEVICE="cuda")
    assert code == 1
    assert "libnvidia-ml.so.1 is not there" in about(found, "gpu", "failure")
