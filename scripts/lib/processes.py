"""Starts processes that never outlive this one, whether it ends normally, by an error, by Ctrl-C or by SIGKILL.

In: command lines. Out: running processes whose output goes to log files in one temporary folder. When `Processes` is
left, or SIGINT, SIGTERM or SIGHUP arrives, all of them and the folder are gone before this process is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

#: What a terminal, a `kill` and a closed window send. SIGKILL needs no handler: the reaper notices.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds that the reaper may take to kill everything and remove the folder; it needs some milliseconds.
REAPING_SECONDS = 10
#: Lines of a dead process's log that tell why it died: a traceback and what led to it.
TAIL_LINES = 40


class RunError(Exception):
    """A script can't go on. The message says why, and is all that is shown."""


class ProcessDiedError(RunError):
    """A process ended while it was needed."""


def celery_command() -> str:
    """The `celery` beside this Python, which need not be on the PATH."""
    return str(Path(sys.executable).with_name("celery"))


class Process:
    """A running process and its log file."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.pid, self.log, self._popen = name, popen.pid, log, popen

    def check(self) -> None:
        """Raises ProcessDiedError, with the end of the log, unless the process is running."""
        code = self._popen.poll()
        if code is not None:
            raise ProcessDiedError(f"{self.name} ended with exit code {code}. The end of its log:\n{self.tail()}")

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    def send(self, number: int) -> None:
        """A signal to the process itself, if it is still there."""
        self._popen.send_signal(number)

    def wait(self, seconds: float | None = None) -> int:
        """The exit code, once it has ended. Raises `subprocess.TimeoutExpired`."""
        return self._popen.wait(seconds)

    def kill(self) -> None:
        """Ends it and all that it started, and waits until it is gone."""
        self.send_all(signal.SIGKILL)
        self._popen.wait()

    def send_all(self, number: int) -> None:
        """A signal to the process and to all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


class Processes:
    """Lives on the main thread; owns the reaper, the temporary folder, and the handlers of `ENDINGS` while entered.

    A signal doesn't raise here: an exception may be swallowed (in a `__del__`, in an import), and its cleanup
    interrupted by the next Ctrl-C. The handler itself closes the reaper's pipe, waits until the reaper is done, and
    ends the process.
    """

    def __init__(self) -> None:
        self._reaper: subprocess.Popen[bytes] | None = None
        self._held = False
        self._arrived: int | None = None

    def __enter__(self) -> Processes:
        for number in ENDINGS:
            signal.signal(number, self._end_now)
        with self.hold():
            self._reaper = _start_reaper()
            self.folder = Path(tempfile.mkdtemp(prefix="legit-worker-"))
            self.end_with_me("folder", self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)  # cleaning up is already what they ask for
        self._reap()
        for number in ENDINGS:
            signal.signal(number, signal.SIG_DFL)

    def start(
        self, name: str, command: list[str], environment: Mapping[str, str], folder: Path | None = None
    ) -> Process:
        """Starts `command` in a process group of its own, so that whatever it starts in turn ends with it."""
        log = self.folder / f"{name}.log"
        with self.hold(), log.open("wb") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder or self.folder,
                start_new_session=True,
            )
            self.end_with_me("group", popen.pid)
        return Process(name, popen, log)

    def end_with_me(self, kind: str, target: object) -> None:
        """Hands the reaper a `group`, a `process` or a `folder`. Start and handing over belong inside one `hold()`."""
        assert self._reaper is not None
        assert self._reaper.stdin is not None
        self._reaper.stdin.write(f"{kind} {target}\n".encode())
        self._reaper.stdin.flush()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Puts off `ENDINGS` until the block is left: nothing is started without the reaper knowing of it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._arrived is not None:
                self._end_now(self._arrived, None)

    def _end_now(self, number: int, frame: FrameType | None) -> None:
        self._arrived = number
        if not self._held:
            self._end(number)

    def _end(self, number: int) -> NoReturn:
        for ending in ENDINGS:
            signal.signal(ending, signal.SIG_IGN)
        self._reap()
        _say_goodbye()
        os._exit(128 + number)  # what a shell reports for a process that this signal ended

    def _reap(self) -> None:
        if self._reaper is not None and self._reaper.stdin is not None:
            self._reaper.stdin.close()
            self._reaper.wait(REAPING_SECONDS)
            _collect_the_dead()


def _start_reaper() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("reaper.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _collect_the_dead() -> None:
    """Takes the exit codes of all children, which are killed by now, so that none stays behind as a zombie."""
    deadline = time.monotonic() + REAPING_SECONDS
    with suppress(ChildProcessError):  # there are no more
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.005)


def _say_goodbye() -> None:
    """Straight to the file descriptor, because the signal may have come in the middle of a print."""
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
    os.write(2, show_cursor + b"\nStopped. Nothing is left running.\n")
