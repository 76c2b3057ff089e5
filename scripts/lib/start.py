"""Runs `demo.py` or `bench.py`, and answers Ctrl-C from the first moment on: their imports alone take seconds.

In: the module's name and its options. Out: its exit code, or 1 and a message when a worker died, got stuck or failed.
"""

from __future__ import annotations

import importlib
import sys

from processes import Processes, RunError


def main() -> int:
    with Processes() as processes:
        script = importlib.import_module(sys.argv[1])
        try:
            return int(script.main(processes, sys.argv[2:]))
        except RunError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
