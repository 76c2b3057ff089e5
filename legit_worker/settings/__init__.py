"""What the operator chose.

In: `LEGIT_WORKER_*` variables, and the TOML file that `LEGIT_WORKER_CONFIG` names; a variable beats the file. Out: a
frozen `Settings`, or a `SettingsError` that names every wrong variable. Nothing here imports Celery, and nothing reads
a device: a process that only looks at its settings never opens a CUDA context.

`schema.py` and `model.py` say which settings there are, `values.py` and `amounts.py` what each may hold, and
`reading.py` reads and shows them. `apps.py` gives each app the bounds of all, and looks for models that only an app's
list has. `nodes.py` gives a worker what is its own. `doubts.py` looks for settings that do nothing together.
"""

from legit_worker.settings.amounts import UNITS, Amount
from legit_worker.settings.apps import unknown_models, with_bounds
from legit_worker.settings.doubts import doubtful, misnamed, taken_for_tasks
from legit_worker.settings.model import ModelSettings
from legit_worker.settings.nodes import models_of, queue_of, strange_name, take_name
from legit_worker.settings.reading import (
    changed,
    is_enabled,
    is_prep,
    listed_changes,
    load,
    load_or_exit,
    unknown,
)
from legit_worker.settings.schema import LIMITS, AppSettings, Settings
from legit_worker.settings.values import (
    DENSE_KINDS,
    KINDS_WITH_PATH,
    NAME,
    PREFIX,
    AppSource,
    fold,
    path_variable,
)

__all__ = [
    "DENSE_KINDS",
    "KINDS_WITH_PATH",
    "LIMITS",
    "NAME",
    "PREFIX",
    "UNITS",
    "Amount",
    "AppSettings",
    "AppSource",
    "ModelSettings",
    "Settings",
    "changed",
    "doubtful",
    "fold",
    "is_enabled",
    "is_prep",
    "listed_changes",
    "load",
    "load_or_exit",
    "misnamed",
    "models_of",
    "path_variable",
    "queue_of",
    "strange_name",
    "take_name",
    "taken_for_tasks",
    "unknown",
    "unknown_models",
    "with_bounds",
]
