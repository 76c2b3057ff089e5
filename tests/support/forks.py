"""A process that has imported something, and a fork of it for each job: a job of its own process, without the import.

In: the import, with a function `job`, and what each job is given. Out: its exit code, and what it printed.

And the start of a process that multiprocessing forks from pytest's own.
"""

from __future__ import annotations

import json
import multiprocessing.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from harness import ANSWER_SECONDS

#: Seconds that a job may take.
JOB_SECONDS = 3 * ANSWER_SECONDS

#: Reads jobs, and writes how each ended.
LOOP = """
import json, os, signal, sys

for line in sys.stdin:
    given, environment, files = json.loads(line)
    child = os.fork()
    if not child:
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_RDWR), number)
        signal.alarm(int(sys.argv[1]))
        os.environ.clear()
        os.environ.update(environment)
        sys.exit(job(given))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """The process. It ends with this one, or when it is closed."""

    def __init__(self, imports: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", imports + LOOP, str(JOB_SECONDS)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, given: Any, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a job with this environment, and wait for its end."""
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder, name) for name in ("out", "err"))
            out.touch()
            err.touch()
            order = [given, dict(environment), ["/dev/null", str(out), str(err)]]
            print(json.dumps(order), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(given, code, out.read_text(), err.read_text())

    def close(self) -> None:
        """Wait for its end."""
        self._process.communicate()


def start_forked(process: BaseProcess) -> None:
    """Start a process of multiprocessing's without kombu's clean-up.

    kombu closes in the child what earlier tests left open, and reads answers that their servers may never send.
    """
    with mock.patch.object(multiprocessing.util, "_run_after_forkers"):
        process.start()
