"""Imports point one way, and what must start fast or stay CUDA-free imports nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import legit_worker

ROOT = Path(legit_worker.__file__).parent

#: From each room, the rooms its modules may import at all. The root's own modules are rooms of one.
ALLOWED = {
    "errors": set(),
    "parking": set(),
    "settings": {"errors"},
    "apps": {"settings"},
    "inputs": {"errors", "settings"},
    "batching": set(),
    "device": {"errors"},
    "prep": {"errors", "inputs", "parking", "settings"},
    "golden": set(),
    "backends": {"device", "errors"},
    "models": {
        "apps",
        "backends",
        "batching",
        "device",
        "errors",
        "golden",
        "inputs",
        "parking",
        "prep",
        "settings",
    },
    "quickjson": set(),
    "tracing": set(),
    "redis_errors": set(),
    "results": {"parking", "redis_errors"},
    "routing": {"apps", "errors", "models", "parking", "redis_errors", "results", "settings", "tracing"},
    "broker": {"quickjson", "redis_errors"},
    "logs": {"apps", "models", "settings"},
    "metrics": {"apps", "batching", "broker", "settings"},
    "pool": {
        "apps",
        "batching",
        "broker",
        "control",
        "device",
        "errors",
        "logs",
        "metrics",
        "models",
        "parking",
        "prep",
        "quickjson",
        "results",
        "routing",
        "settings",
        "tracing",
    },
    "task_limits": {"apps", "inputs", "settings"},
    "prep_tasks": {"errors", "inputs", "models", "prep", "settings", "task_limits"},
    "tasks": {"errors", "inputs", "models", "prep_tasks", "settings", "task_limits"},
    "control": {"errors", "models", "settings"},
    "install": {
        "control",
        "device",
        "errors",
        "logs",
        "metrics",
        "models",
        "pool",
        "prep",
        "routing",
        "settings",
        "tasks",
    },
    "routes": {"settings"},
    "celery": {"install", "routes", "settings", "tasks"},
    "validation": {"errors", "golden", "routing", "settings"},
    "doctor": {"device", "errors", "golden", "models", "prep", "prep_tasks", "routing", "settings"},
    "cli": {"control", "doctor", "errors", "routing", "settings", "validation"},
    "testing": {"device", "models", "parking", "pool", "settings", "task_limits", "tasks"},
    "__init__": {"install", "models", "pool"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {parts[1] for parts in (name.split(".") for name in names) if parts[0] == "legit_worker" and parts[1:]}
    return rooms


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_the_rooms_below_its_own(path: Path) -> None:
    assert imported_rooms(path) - {room(path)} <= ALLOWED[room(path)]


@pytest.mark.parametrize("path", sorted((ROOT / "batching").glob("*.py")), ids=lambda path: path.name)
def test_the_arithmetic_of_batches_imports_nothing_but_numpy(path: Path) -> None:
    outside = {
        (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    } | {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert outside - set(sys.stdlib_module_names) <= {"numpy", "legit_worker"}


@pytest.mark.parametrize(
    "module",
    [
        "legit_worker",
        "legit_worker.settings",
        "legit_worker.celery",
        "legit_worker.pool",
        "legit_worker.cli",
        "legit_worker.tasks",
    ],
)
def test_importing_it_imports_neither_torch_nor_nvml(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'pynvml', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_celery_command_gets_the_group_alone() -> None:
    code = "import sys, celery.bin.celery, legit_worker.cli; print('rich' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_handle_that_was_made_before_its_class_was_imported_is_one_once_it_is_used() -> None:
    code = (
        "import contextlib, copy, pickle, legit_worker; before = legit_worker.model('m'); "
        "handle, told = pickle.loads(pickle.dumps(copy.copy(before))), repr(before)\n"
        "with contextlib.suppress(AttributeError): handle.truncate_dim = 8\n"
        "assert 'truncate_dim' not in vars(handle)\n"
        "assert type(handle) is type(legit_worker.model('m')), type(handle)\n"
        "assert repr(handle) == told == '<Handle m>', (repr(handle), told)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_client_whose_environment_has_no_settings_imports_next_to_nothing() -> None:
    code = (
        "import sys; from celery import Celery; import legit_worker; legit_worker.install(Celery()); "
        "handle = legit_worker.model('minilm'); "
        "print(sorted({'numpy', 'torch', 'pydantic', 'redis', 'asyncio'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LEGIT_WORKER_")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_device_room_and_the_guard_against_it_name_cuda(path: Path) -> None:
    if room(path) == "device" or path.name in ("guard.py", "probes.py"):
        return
    asked = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert not asked
