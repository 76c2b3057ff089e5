"""Two thousand odd inputs, at the border and in a worker: each ends in a clear error, on its task alone."""

from __future__ import annotations

import subprocess
import sys

from harness import ROOT

#: Seconds for all of them. They take half a minute; a machine may do much else.
SECONDS = 300


def test_no_odd_input_gets_past_the_border() -> None:
    """`scripts/fuzz` without its setup. The seed is fixed: what it finds, it finds at each run."""
    command = [sys.executable, str(ROOT / "scripts" / "lib" / "start.py"), "fuzz", "--inputs", "2000", "--seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    assert run.stdout.count("| 0 |\n") > 10
