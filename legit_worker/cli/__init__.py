"""`celery legit …`: an operator's questions to the workers.

In: `celery -A PROJECT`. The answers come by the project's broker. Out: tables for people, in 80 columns, or JSON with
`--json`. If a command fails, it prints one sentence on stderr and sets an exit code.
"""

from legit_worker import control
from legit_worker.cli import checks, dead, models, queues, status, top
from legit_worker.cli.base import legit

# `celery control legit_load` asks this process whether there is such a command.
control.describe()

__all__ = ["checks", "dead", "legit", "models", "queues", "status", "top"]
