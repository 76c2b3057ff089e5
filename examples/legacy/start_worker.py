"""Start the worker of one stage, as this project always did: `python start_worker.py embed`; a second one is `embed 2`.

The worker gets this process's environment. SIGTERM ends it warmly: its tasks end, the others stay with the broker.
"""

from __future__ import annotations

import signal
import subprocess
import sys

stage, *number = sys.argv[1:]
name = "-".join([stage, *number])
command = [sys.executable, "-m", "celery", "-A", "pipeline", "worker", "--pool=solo", "-Q", stage, "-l", "INFO"]
worker = subprocess.Popen([*command, "-n", f"{name}@%h"])
signal.signal(signal.SIGTERM, lambda *_: worker.terminate())
signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the worker, too
sys.exit(worker.wait())
