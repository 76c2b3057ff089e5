"""Stub drivers, so that real libraries run where there is no GPU and every call they make is seen.

In: a C file of `tests/support/stubs`. Out: a folder for `LD_LIBRARY_PATH` with the library that it is compiled to.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

STUBS = Path(__file__).parent / "stubs"


def build(source: str, library: str, folder: Path) -> Path:
    """Compile `tests/support/stubs/<source>` to `<folder>/<library>`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(folder / library), str(STUBS / source)]
    subprocess.run(command, check=True)
    return folder


def torch_has_cuda() -> bool:
    """Whether torch is built for CUDA, with a GPU or without."""
    import torch

    return torch.version.cuda is not None


@dataclass(frozen=True)
class CudaDriver:
    """A driver that has no device and logs who calls it."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> CudaDriver:
        """Compile it."""
        return cls(build("cuda.c", "libcuda.so.1", folder))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("LD_LIBRARY_PATH")]))
        return {"LD_LIBRARY_PATH": path, "LEGIT_TEST_CUDA_LOG": str(self._log)}

    @property
    def calls(self) -> list[str]:
        """The functions that were called, by whatever process, and `loaded` for each that loaded the library."""
        return [line.partition(" ")[2] for line in self._log.read_text().splitlines()] if self._log.exists() else []

    @property
    def asked(self) -> list[str]:
        """Without the loads, where the linker has torch do that: one that is built for CUDA names the library."""
        return [call for call in self.calls if call != "loaded" or not torch_has_cuda()]

    @property
    def _log(self) -> Path:
        return self.folder / "calls.log"


@dataclass(frozen=True)
class Nvml:
    """NVML over a machine that the test makes up: `tests/support/stubs/nvml.c` says how it is written down."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> Nvml:
        """Compile it."""
        return cls(build("nvml.c", "libnvidia-ml.so.1", folder))

    def environment(self, world: str) -> dict[str, str]:
        """What a process needs to find it, and that machine."""
        file = self.folder / "world"
        file.write_text(world)
        return {"LD_LIBRARY_PATH": str(self.folder), "LEGIT_TEST_NVML_WORLD": str(file)}
