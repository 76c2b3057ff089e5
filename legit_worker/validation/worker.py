"""A `celery worker` of one's own, on one queue, for as long as a comparison takes.

In: the name of the project's app, a queue, and more variables. Out: a running worker that is gone when its block is
left, by whatever way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

from legit_worker.validation.reference import ValidationError

#: Seconds for a worker with nothing to do to end when it is told to. It needs one.
STOP_SECONDS = 15

#: What a `kill` and a closed window send. Ctrl-C raises by itself.
ENDINGS = (signal.SIGTERM, signal.SIGHUP)

#: Lines of a dead worker's log that tell why it died.
TAIL_LINES = 20


class PrivateWorker:
    """A child process, in a session of its own, so that Ctrl-C reaches only its parent, which then ends it."""

    def __init__(self, project: str, queue: str, name: str, variables: Mapping[str, str]) -> None:
        self._command = [
            *(sys.executable, "-m", "celery", "-A", project, "worker", "--pool=solo", "--loglevel=INFO"),
            *(f"--queues={queue}", f"--hostname={name}"),
        ]
        self._environment = {**os.environ, **variables}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed when the worker is
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateWorker:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with _undisturbed():
            self._stop()
            self._log.close()

    def check(self) -> None:
        """Raises `ValidationError` where the worker has ended, or can't do its task."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            raise ValidationError(f"the worker ended with exit code {code}. The end of its log:\n{self.tail()}")
        if "Received unregistered task" in self.log():
            raise ValidationError(
                "the project's worker has no task legit_worker.embed_text: call legit_worker.install(app) where the "
                "app is made"
            )

    def log(self) -> str:
        """All that it wrote so far."""
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def tail(self) -> str:
        """The end of that."""
        return "\n".join(self.log().splitlines()[-TAIL_LINES:])

    def _stop(self) -> None:
        """First as one asks a worker to; then it and all that it started, without asking."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def ending_by_exception() -> Iterator[None]:
    """Inside, the signals that end a process raise `SystemExit`, so that what was started is cleaned up."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Cleaning up is already what these ask for."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDINGS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
