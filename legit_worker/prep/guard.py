"""Keeps a process clear of CUDA, and says who asked for it.

In: a process that has not touched CUDA yet. Out: a process that can't. It and its children see no device, and Python
code that would start CUDA raises `CudaForbiddenError` with the line that asked. Otherwise a look at a device's
properties would open a context, which takes hundreds of megabytes that no worker accounts for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from legit_worker.errors import CudaForbiddenError

#: An empty value hides every device from CUDA's driver, and so from libraries that this guard doesn't know.
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}

#: The names by which code may ask ctypes for the driver's or the runtime's library.
CUDA_LIBRARY = re.compile(r"(^|/)(libcuda(rt)?\.so|nvcuda\.dll|cudart)")

#: torch's functions that ask the driver without starting CUDA, and their answers if there is no device.
QUESTIONS = {"is_available": False, "device_count": 0}

#: Frames in these folders are the library's, not the caller's.
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))

_is_forbidden = False


def forbid_cuda() -> None:
    """Forbid CUDA in this process and its children. A second call changes nothing."""
    global _is_forbidden
    os.environ.update(HIDDEN)
    if _is_forbidden:
        return
    _is_forbidden = True
    sys.addaudithook(_refuse_library)
    if "torch" in sys.modules:
        forbid_torch(sys.modules["torch"])
    else:
        sys.meta_path.insert(0, TorchFinder())


def forbid_torch(torch: Any) -> None:
    """Make an imported torch refuse CUDA. It asks the driver nothing any more, not even whether a device is there."""
    if torch.cuda.is_initialized():
        refuse("CUDA was started before legit_worker.install() could forbid it")
    for name, answer in QUESTIONS.items():
        setattr(torch.cuda, name, lambda answer=answer: answer)
    start = torch.cuda._lazy_init
    # Submodules of torch.cuda have imported the function by its name.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("torch") and vars(module).get("_lazy_init") is start:
            module._lazy_init = _refuse_torch  # type: ignore[attr-defined]


class TorchFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Waits for the import of torch, and makes torch refuse CUDA."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return torch's own spec, with this loader around torch's."""
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module as torch's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Import torch, and then make it refuse CUDA."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        forbid_torch(module)


def refuse(what: str) -> NoReturn:
    """Raise `CudaForbiddenError`, with the line outside all libraries that asked."""
    raise CudaForbiddenError(
        f"{what}{_caller()}. This process prepares input (LEGIT_WORKER_ROLE=prep, or a helper of PREP_PROCESSES) and "
        "may not touch CUDA: a context would take device memory that no worker accounts for. Move this to a task of "
        "the device worker"
    )


def _refuse_torch() -> NoReturn:
    refuse("torch was asked to start CUDA")


def _refuse_library(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse CUDA's libraries to ctypes. Python calls this audit hook for every audited event."""
    if event == "ctypes.dlopen" and CUDA_LIBRARY.search(str(arguments[0])):
        refuse(f"the CUDA library {arguments[0]} was asked for")


def _caller() -> str:
    """Return the innermost line outside this module and all libraries; else the innermost outside this module."""
    frame, nearest = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__:
            place = f" by {Path(file).name}:{frame.f_lineno} ({file})"
            if not file.startswith((*LIBRARIES, "<")):
                return place
            nearest = nearest or place
        frame = frame.f_back  # type: ignore[assignment]
    return nearest
