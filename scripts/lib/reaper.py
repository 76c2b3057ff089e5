"""Ends what a script started, however the script itself ends: `processes.py` starts one of these before anything else.

In, on standard input, one line for each thing to clean up: `group PGID`, `process PID` or `folder PATH`. Nothing
comes out. When the pipe closes, because the script said so or because it died (even by SIGKILL), the reaper kills
every group and process, then removes every folder. It lives in a session of its own, so that Ctrl-C in the terminal
doesn't reach it. Standard library only: it has to be running before anything slow is imported.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders = [line.rstrip("\n").split(" ", 1) for line in sys.stdin]
    for kind, target in reversed(orders):  # workers before their broker: they would log that it is gone
        if kind != "folder":
            kill(kind, int(target))
    remove(target for kind, target in orders if kind == "folder")


def kill(kind: str, target: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it ended by itself, and is a zombie or gone
        (os.killpg if kind == "group" else os.kill)(target, signal.SIGKILL)


def remove(folders: Iterable[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
