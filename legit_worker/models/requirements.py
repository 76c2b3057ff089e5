"""What the configured models need that this machine may not have.

In: the settings. Out: `SettingsError`, with the command that installs what is missing. Nothing is imported: whether a
package is there is found out in a millisecond, where torch takes seconds to import.
"""

from __future__ import annotations

import importlib.util

from legit_worker.errors import SettingsError
from legit_worker.settings import KINDS_WITH_PATH, Settings

#: The packages that a model of a kind needs, by role, and the extra of this package that brings them.
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "device": {
        **dict.fromkeys(KINDS_WITH_PATH, ("torch", "sentence_transformers")),
        "image": ("torch", "sentence_transformers", "PIL"),
    },
    "prep": {"embed": ("tokenizers",), "image": ("PIL",)},
}
EXTRAS = {"device": "sentence-transformers", "prep": "prep"}


def check(chosen: Settings) -> None:
    """Raises `SettingsError` if a configured model can't be used here."""
    for alias, model in chosen.models.items():
        needed = NEEDED[chosen.role].get(model.kind, ())
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise SettingsError(
                f"model {alias!r} is of kind {model.kind!r}, which needs {' and '.join(missing)}, not installed in "
                f"this Python: pip install 'legit-worker[{EXTRAS[chosen.role]}]'"
            )


def check_or_exit(chosen: Settings) -> None:
    """At a worker's start: the process ends with the sentence instead of a traceback."""
    try:
        check(chosen)
    except SettingsError as error:
        raise SystemExit(f"legit_worker: {error}") from None
