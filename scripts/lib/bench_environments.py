"""Environments for what the benchmark compares with, each in a folder of its own under `.venv-bench`.

In: the name of an environment. Out: its Python. Everything that `.venv` has is visible in each of them, so that torch
is there once; what a peer needs in another version is installed before it. Made once, and again after a change. Git
ignores the folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from processes import Processes, RunError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-bench"

#: Releases are named, so that two runs compare with the same peer.
PACKAGES = {
    "batches": ("celery-batches==0.11",),
    "infinity": ("infinity-emb[server,torch]==0.0.78", "aiohttp"),
    "litserve": ("litserve==0.2.19", "aiohttp"),
    "openvino": ("openvino>=2025.2",),
    "plot": ("matplotlib>=3.9",),
}

#: Seconds for one installation, on a slow line.
INSTALL_SECONDS = 900


class UnavailableError(RunError):
    """A configuration can't run here. The message says why, and stands in the table."""


def python_of(processes: Processes, name: str) -> Path:
    """The environment's interpreter. Raises `UnavailableError` with pip's reason."""
    folder = FOLDER / name
    python, stamp = folder / "bin" / "python", folder / "stamp"
    if not stamp.exists() or stamp.read_text() != _contents(name):
        shutil.rmtree(folder, ignore_errors=True)
        _run(processes, f"venv-{name}", [sys.executable, "-m", "venv", str(folder)])
        _share(folder)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
        _run(processes, f"pip-{name}", [*pip, *_wanted(name)])
        stamp.write_text(_contents(name))
    return python


def _share(folder: Path) -> None:
    """Paths of a `.pth` file come after the environment's own packages."""
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")


def _wanted(name: str) -> tuple[str, ...]:
    """The torch that is there already comes first: pip would bring another one, with gigabytes of CUDA libraries."""
    return f"torch=={importlib.metadata.version('torch').split('+')[0]}", *PACKAGES[name]


def _contents(name: str) -> str:
    return "\n".join((sys.version, sysconfig.get_paths()["purelib"], *_wanted(name)))


def _run(processes: Processes, name: str, command: list[str]) -> None:
    process = processes.start(name, command, plain_environment())
    try:
        code = process.wait(INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{name} takes more than {INSTALL_SECONDS} s") from None
    if code:
        lines = [line for line in process.tail().splitlines() if line.strip()]
        raise UnavailableError(next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]))


def plain_environment() -> dict[str, str]:
    """Without a PYTHONPATH: pip would count what lies there as installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
