"""How many bytes a model's weights will take, before they are read.

In: a model's settings. Out: bytes, by what its files say and by the dtype that it is loaded as.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from legit_worker.models.simulated import SimulatedModel
from legit_worker.prep.texts import model_folder
from legit_worker.settings import ModelSettings

logger = logging.getLogger(__name__)

#: Bytes of a floating-point value by its name in a file: those that a model's `DTYPE` replaces.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

#: Bytes of a value by `DTYPE`. `auto`, as None, is what the file has.
DTYPES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "int8": 4}

#: No header of a file is longer, bytes: the format's own bound.
LONGEST_HEADER = 100_000_000


def estimate(spec: ModelSettings) -> int:
    """Bytes of a model's weights before it was ever loaded; 0 if its path does not tell."""
    if spec.kind == "simulated":
        return SimulatedModel(spec.path).memory()
    folder = model_folder(spec.path, spec.revision) if spec.path else None
    if folder is None:
        return 0
    if files := list(_chosen(folder)):
        return sum(_stored(file, DTYPES.get(spec.dtype or "")) for file in files)
    return sum(file.stat().st_size for file in folder.rglob("*.bin") if file.is_file())


def _chosen(folder: Path) -> Iterator[Path]:
    """Of each folder the files that are loaded: some have the same weights twice, in parts or in another shape."""
    by_folder: dict[Path, list[Path]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if file.is_file():
            by_folder.setdefault(file.parent, []).append(file)
    for files in by_folder.values():
        whole = [file for file in files if file.name == "model.safetensors"]
        parts = [file for file in files if file.name.startswith("model-0")]
        yield from whole or parts or files


def _stored(file: Path, as_bytes: int | None) -> int:
    """Bytes of a file's tensors, whose floats take `as_bytes` each; None: as they are stored."""
    try:
        header = _header(file)
        return sum(_bytes(**tensor, as_bytes=as_bytes) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
        logger.warning("%s has no header that can be read (%s): its weights count as large as the file", file, error)
        return file.stat().st_size


def _header(file: Path) -> dict[str, Any]:
    """A safetensors file's: eight bytes of length, and JSON with each tensor's dtype, shape and place."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > LONGEST_HEADER:
            raise ValueError(f"its header would have {length} bytes")
        header: dict[str, Any] = json.loads(opened.read(length))
    return header


def _bytes(dtype: str, shape: list[int], data_offsets: tuple[int, int], as_bytes: int | None) -> int:
    begin, end = data_offsets
    stored = FLOATS.get(dtype)
    return (end - begin) // stored * as_bytes if stored and as_bytes else end - begin
