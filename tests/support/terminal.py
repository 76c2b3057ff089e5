"""A shell in which commands run as a user types them, without what the harness adds to a worker's command line.

In: a folder, a broker. Out: what commands print, and a worker that is gone when the test is.
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import ENVIRONMENT, FOREIGN, ROOT, START_SECONDS, Broker, poll

#: Seconds for a command that ends by itself.
COMMAND_SECONDS = 120


class Terminal:
    """A folder, new or not, and the environment of a user who has installed the package."""

    def __init__(self, folder: Path, broker: Broker, **settings: str) -> None:
        folder.mkdir(exist_ok=True)
        self._log = folder.with_name(f"{folder.name}.log")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        installed = {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "PYTHONPATH": path}
        servers = {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": broker.backend}
        environment = kept | ENVIRONMENT | installed | servers | settings
        self._place: dict[str, Any] = {"cwd": folder, "env": environment}

    def run(self, command: str) -> str:
        """What a command prints, once it is over."""
        finished = subprocess.run(
            ["bash", "-ec", command],
            **self._place,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
        return finished.stdout

    @contextlib.contextmanager
    def worker(self, commands: list[str], ready: str) -> Iterator[None]:
        """Run commands, of which the last starts a worker or a server. It is there once the log says `ready`."""
        with self._log.open("wb") as output:
            shell = subprocess.Popen(
                ["bash", "-ec", "\n".join(commands)],
                **self._place,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        def is_ready() -> bool:
            assert shell.poll() is None, self._log.read_text()
            return ready in self._log.read_text()

        try:
            poll(is_ready, f"{ready!r} in the worker's log", START_SECONDS)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()


def write_to_terminal(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command writes where its output is a terminal, to its end."""
    ours, theirs = pty.openpty()
    with contextlib.closing(os.fdopen(ours, "rb", buffering=0)) as screen:
        process = subprocess.Popen(
            command,
            env={**environment, "TERM": "xterm", "COLUMNS": "120"},
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # Linux tells the end by an error
            while part := screen.read(65536):
                written += part
    assert process.wait(COMMAND_SECONDS) == 0, written
    return written.decode()
