"""What the configured models need that this machine may not have.

In: the settings. Out: `SettingsError`, with the command that installs a missing package. Nothing is imported: a look
for a package takes a millisecond, and the import of torch takes seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import os

from legit_worker.errors import SettingsError
from legit_worker.settings import KINDS_WITH_PATH, ModelSettings, Settings

logger = logging.getLogger(__name__)

#: No name on the Hub begins like this: such a path is a folder's.
FOLDER_SIGNS = ("/", "./", "../", "~")

#: The packages that a model of a kind needs, by role, and the extra of this package that brings them.
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "device": {
        **dict.fromkeys(KINDS_WITH_PATH, ("torch", "sentence_transformers")),
        "image": ("torch", "sentence_transformers", "PIL"),
    },
    "prep": {"embed": ("tokenizers",), "image": ("PIL",)},
}
EXTRAS = {"device": "sentence-transformers", "prep": "prep"}

#: The package that computes a backend, and so does an extra of this name. `auto` goes without.
BACKENDS = {"openvino": "openvino", "onnx": "openvino"}


def check(chosen: Settings) -> None:
    """Raise `SettingsError` if a configured model can't be used here."""
    for alias, model in chosen.models.items():
        needed = NEEDED[chosen.role].get(model.kind, ())
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise SettingsError(
                f"model {alias!r} is of kind {model.kind!r}, which needs {' and '.join(missing)}, not installed in "
                f"this Python: pip install 'legit-worker[{EXTRAS[chosen.role]}]'"
            )
        if chosen.role == "device":
            _check_backend(alias, model)


def _check_backend(alias: str, model: ModelSettings) -> None:
    package = BACKENDS.get(model.backend)
    if package is not None and importlib.util.find_spec(package) is None:
        raise SettingsError(
            f"model {alias!r} has BACKEND={model.backend}, which needs {package}, not installed in this Python: "
            f"pip install 'legit-worker[{package}]'"
        )
    if model.dtype == "int8" and importlib.util.find_spec("nncf") is None:
        raise SettingsError(
            f"model {alias!r} has DTYPE=int8, which needs nncf, not installed in this Python: pip install nncf"
        )


def is_missing_folder(path: str) -> bool:
    """Tell whether this path can only be a folder's, and the folder is missing."""
    return path.startswith(FOLDER_SIGNS) and not os.path.isdir(path)


def check_or_exit(chosen: Settings) -> None:
    """Check at a worker's start. If a model can't be used, end the process with a sentence instead of a traceback.

    A missing folder is a warning: it may be there when the first task asks for its model.
    """
    try:
        check(chosen)
    except SettingsError as error:
        raise SystemExit(f"legit_worker: {error}") from None
    for alias, model in chosen.models.items():
        if model.kind in KINDS_WITH_PATH and model.path and is_missing_folder(model.path):
            logger.warning("model %r: there is no folder %s, so its tasks will fail", alias, model.path)
