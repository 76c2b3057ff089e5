"""What the operator chose.

In: `LEGIT_WORKER_*` variables, and the TOML file that `LEGIT_WORKER_CONFIG` names; a variable beats the file. Out: a
frozen `Settings`, or a `SettingsError` that names every variable that is wrong. Nothing here imports Celery, and
nothing reads a device: a process that only looks at its settings never opens a CUDA context.

`values.py` says what one variable may hold, `schema.py` which variables there are, and `reading.py` reads them.
"""

from legit_worker.settings.reading import is_enabled, is_prep, load, load_or_exit, unknown
from legit_worker.settings.schema import (
    PREFIX,
    AppSettings,
    ModelSettings,
    Settings,
    changed,
    listed_changes,
    not_yet_in_effect,
    path_variable,
)
from legit_worker.settings.values import BUILT_IN_TASKS, KINDS_WITH_PATH, NAME, UNITS, Amount, AppSource, fold

__all__ = [
    "BUILT_IN_TASKS",
    "KINDS_WITH_PATH",
    "NAME",
    "PREFIX",
    "UNITS",
    "Amount",
    "AppSettings",
    "AppSource",
    "ModelSettings",
    "Settings",
    "changed",
    "fold",
    "is_enabled",
    "is_prep",
    "listed_changes",
    "load",
    "load_or_exit",
    "not_yet_in_effect",
    "path_variable",
    "unknown",
]
