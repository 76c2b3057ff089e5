"""Which weights these are, so that an index can tell when it must be built anew.

In: a model's path. Out: the commit on the Hub, or a hash of the files in its folder.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

from legit_worker.prep.texts import model_folder

#: What a model computes with: weights, and the settings of its modules, its tokenizer and its prompts.
FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.py", "*.onnx")

#: Hexadecimal digits of a hash that are shown: two models share them once in 2^64 pairs.
SHOWN = 16

#: Bytes of a file that are read at a time.
BLOCK = 1 << 20


def revision_of(path: str, revision: str | None) -> str | None:
    """Return the model's commit, or `sha256:` and the hash of its files; None if they are not on this machine.

    A folder is read once for each state of its files: about a second for each GiB.
    """
    folder = model_folder(path, revision)
    if folder is None:
        return None
    # Where the Hub's library keeps what it downloaded, by commit.
    if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
        return folder.name
    files = sorted(file for pattern in FILES for file in folder.rglob(pattern) if file.is_file())
    return _hash(str(folder), tuple((str(file.relative_to(folder)), *_state(file)) for file in files))


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _hash(folder: str, files: tuple[tuple[str, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for name, size, _ in files:
        whole.update(f"{name}\0{size}\0".encode())
        with (Path(folder) / name).open("rb") as opened:
            while block := opened.read(BLOCK):
                whole.update(block)
    return f"sha256:{whole.hexdigest()[:SHOWN]}"
