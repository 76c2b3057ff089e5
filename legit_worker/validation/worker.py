"""A private `celery worker` on one queue, for the time of a comparison.

In: the name of the project's app, a queue, and more variables. Out: a running worker, which ends with its block.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import IO, Any

from legit_worker.validation.reference import ValidationError

#: Seconds for an idle worker to end after the signal. It needs one.
STOP_SECONDS = 15

#: The signals of `kill` and of a closed window. Ctrl-C raises by itself.
ENDINGS = (signal.SIGTERM, signal.SIGHUP)

ALL_ENDINGS = (signal.SIGINT, *ENDINGS)

#: The last lines of a dead worker's log that an error shows.
TAIL_LINES = 20


class PrivateWorker:
    """A child process in its own session: Ctrl-C reaches only the parent, and the parent ends the child."""

    def __init__(self, project: str, queue: str, name: str, variables: Mapping[str, str]) -> None:
        self._command = [
            *(sys.executable, "-m", "celery", "-A", project, "worker", "--pool=solo", "--loglevel=INFO"),
            *(f"--queues={queue}", f"--hostname={name}"),
        ]
        self._environment = {**os.environ, **variables}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed when the worker is
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateWorker:
        return self

    def start(self) -> None:
        """Start it, within its block: a signal that comes meanwhile ends the block, and so the worker."""
        came: list[int] = []
        with _handling(ALL_ENDINGS, lambda number, _: came.append(number)):
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        for number in came:
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        # These signals ask for the end that has begun.
        with _handling(ALL_ENDINGS, signal.SIG_IGN):
            self._stop()
            self._log.close()

    def check(self) -> None:
        """Raise `ValidationError` if the worker has ended, or can't do its task."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            raise ValidationError(f"the worker ended with exit code {code}. The end of its log:\n{self.tail()}")
        if "Received unregistered task" in self.log():
            raise ValidationError(
                "the project's worker has no task legit_worker.…: call legit_worker.install(app) where you make the app"
            )

    def log(self) -> str:
        """Return the worker's log so far."""
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def tail(self) -> str:
        """Return the end of the log."""
        return "\n".join(self.log().splitlines()[-TAIL_LINES:])

    def _stop(self) -> None:
        """Ask the worker to end; then kill it and all processes that it started."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def ending_by_exception() -> AbstractContextManager[None]:
    """Let the signals that end a process raise `SystemExit` in the block, so that it cleans up."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    return _handling(ENDINGS, end)


@contextmanager
def _handling(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
