"""Keeps a process clear of CUDA, and says who wanted it.

In: a process that has not touched CUDA yet. Out: one that can't. No device is visible to it or to its children, and
whatever would start CUDA by Python's own ways raises `CudaForbiddenError` with the line that asked. A phantom context,
opened by a look at a device's properties, takes hundreds of megabytes that nobody accounts for.
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

#: Set to nothing, it hides every device from CUDA's driver, and so from libraries that this guard doesn't know.
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}

#: The driver's library and the runtime's, as ctypes may be asked for them.
CUDA_LIBRARY = re.compile(r"(^|/)(libcuda(rt)?\.so|nvcuda\.dll|cudart)")

#: torch's functions that ask the driver without starting CUDA, and what they say where there is no device.
QUESTIONS = {"is_available": False, "device_count": 0}

#: Frames in these folders are the library's, not the caller's.
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))

_is_forbidden = False


def forbid_cuda() -> None:
    """From now on, in this process and its children. Once is enough, twice does no harm."""
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


def is_cuda_forbidden() -> bool:
    """Whether this process may not touch CUDA."""
    return _is_forbidden


def forbid_torch(torch: Any) -> None:
    """Have an imported torch refuse. It asks the driver nothing any more, not even whether there is one."""
    if torch.cuda.is_initialized():
        refuse("CUDA was started before legit_worker.install() could forbid it")
    for name, answer in QUESTIONS.items():
        setattr(torch.cuda, name, lambda answer=answer: answer)
    start = torch.cuda._lazy_init
    # Each submodule of torch.cuda has imported the function by its name.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("torch") and vars(module).get("_lazy_init") is start:
            module._lazy_init = _refuse_torch  # type: ignore[attr-defined]


class TorchFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Waits for torch to be imported, by whomever, and has it refuse."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """torch's own spec, with this loader around its own."""
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As torch's own loader does it."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The import itself, and at its end the refusal."""
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
    """An audit hook. Python tells it, among all else, of libraries that ctypes opens."""
    if event == "ctypes.dlopen" and CUDA_LIBRARY.search(str(arguments[0])):
        refuse(f"the CUDA library {arguments[0]} was asked for")


def _caller() -> str:
    """The innermost line that is neither this module's nor a library's; else the innermost that is not this one's."""
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
