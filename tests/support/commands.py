"""`celery …` commands that end by themselves, each in a process of its own.

In: a project, words, a broker, settings. Out: the exit code, and what was printed. A command takes a second to import
Celery and the package, and the tests run 150 of them, so each is forked from one process that has imported these.
"""

from __future__ import annotations

import atexit
import functools
import subprocess
from collections.abc import Mapping

from forks import JOB_SECONDS, Forks
from harness import Broker, own_environment, project_environment

#: Seconds that a command may take.
COMMAND_SECONDS = JOB_SECONDS

#: What is imported reads no settings yet. No project is.
CELERY = """
import sys
import celery.backends.redis, kombu.transport.redis, legit_worker.install, legit_worker.routing, rich.table
from celery.bin.celery import celery

def job(words):
    sys.argv = ["celery", *words]
    return celery(words, prog_name="celery", auto_envvar_prefix="CELERY")
"""


def celery(
    project: str | None, *words: str, broker: Broker, settings: Mapping[str, str] | None = None, columns: int = 80
) -> subprocess.CompletedProcess[str]:
    """`celery -A project …`, as an operator types it in a terminal of so many columns."""
    arguments = ["-A", project, *words] if project else [*words]
    return _forks().run(arguments, project_environment(broker, settings) | {"COLUMNS": str(columns)})


@functools.cache
def _forks() -> Forks:
    forks = Forks(CELERY, own_environment())
    atexit.register(forks.close)
    return forks
