"""Keeps converted models on disk, so that the next load of the same weights need not convert them.

In: a key, and the files of an entry. Out: the same files later, whole or not at all. Nothing here knows OpenVINO. If
the folder can't be written, nothing is kept, which is no error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

#: The file of an entry with the others' digests.
MANIFEST = "files.json"

#: Bytes of a file that are read at once for its digest.
PART = 2**20

#: Begins the name of an entry that is being written.
UNFINISHED = ".new-"

#: Access to a whole entry: workers of other users may share the folder.
OPEN = 0o755

#: Seconds after which such an entry is a dead worker's. To write one takes a minute at most.
ABANDONED = 3600.0


def default_folder() -> Path | None:
    """Return the folder for what this user's programs may make anew; None if the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "legit_worker"
    except RuntimeError:
        return None


class Cache:
    """One folder, which other workers may use at the same time. `folder=None` is the default one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or default_folder()

    def read(self, key: str) -> Path | None:
        """Return an entry's folder if all its files are whole. One that is not is removed."""
        entry = self._folder / key if self._folder else None
        if entry is None or not entry.is_dir():
            return None
        if _is_whole(entry):
            return entry
        logger.warning("the converted model in %s is damaged: it is made anew", entry)
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def write(self, key: str, save: Callable[[Path], None]) -> Path | None:
        """Have `save` write an entry's files into a folder. Returns the entry's folder, or None if there is none.

        If another worker has written the same entry meanwhile, that one stays.
        """
        if self._folder is None:
            logger.info("this user has no home, so each load converts the model: set LEGIT_WORKER_CACHE_DIR")
            return None
        unfinished = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _sweep(self._folder)
            unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self._folder))
            save(unfinished)
            digests = {file.name: _digest(file) for file in unfinished.iterdir()}
            (unfinished / MANIFEST).write_text(json.dumps(digests))
            unfinished.chmod(OPEN)
            _rename(unfinished, self._folder / key)
        except (OSError, RuntimeError) as error:  # OpenVINO raises the second if the disk is full
            logger.info("the converted model can't be kept in %s, so each load converts it: %s", self._folder, error)
            return None
        finally:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
        return self.read(key)


def _sweep(folder: Path) -> None:
    """Remove what workers left that were killed while they wrote."""
    for entry in folder.glob(f"{UNFINISHED}*"):
        with suppress(FileNotFoundError):  # its worker has just finished it
            if time.time() - entry.stat().st_mtime > ABANDONED:
                shutil.rmtree(entry, ignore_errors=True)


def _rename(unfinished: Path, entry: Path) -> None:
    try:
        unfinished.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise


def _is_whole(entry: Path) -> bool:
    try:
        digests: dict[str, str] = json.loads((entry / MANIFEST).read_text())
        return all(_digest(entry / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(PART):
            digest.update(part)
    return digest.hexdigest()
