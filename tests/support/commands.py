"""`celery …` commands that end by themselves, each in a process of its own.

In: a project, words, a broker, settings. Out: the exit code, and what was printed. A command takes a second to import
Celery and the package, and the tests run 150 of them, so each is forked from one process that has imported these.
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from harness import ANSWER_SECONDS, Broker, own_environment, project_environment

#: Seconds that a command may take.
COMMAND_SECONDS = 3 * ANSWER_SECONDS

#: Reads commands, and writes how each ended. It imports no project, and what it imports reads no settings yet.
FORKS = """
import json, os, signal, sys
import celery.backends.redis, kombu.transport.redis, legit_worker.install, legit_worker.routing, rich.table
from celery.bin.celery import celery

for line in sys.stdin:
    words, environment, files, seconds = json.loads(line)
    child = os.fork()
    if not child:
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_RDWR), number)
        signal.alarm(seconds)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["celery", *words]
        sys.exit(celery(words, prog_name="celery", auto_envvar_prefix="CELERY"))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def celery(
    project: str | None, *words: str, broker: Broker, settings: Mapping[str, str] | None = None, columns: int = 80
) -> subprocess.CompletedProcess[str]:
    """`celery -A project …`, as an operator types it in a terminal of so many columns."""
    arguments = ["-A", project, *words] if project else [*words]
    environment = project_environment(broker, settings) | {"COLUMNS": str(columns)}
    forks = _forks()
    assert forks.stdin
    assert forks.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        out.touch()
        err.touch()
        order = [arguments, environment, ["/dev/null", str(out), str(err)], COMMAND_SECONDS]
        print(json.dumps(order), file=forks.stdin, flush=True)
        code = int(forks.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


@functools.cache
def _forks() -> subprocess.Popen[str]:
    """The process that has imported Celery. It ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        env=own_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process
