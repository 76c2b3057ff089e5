"""A second worker starts while tasks wait: when do they end? `python scripts/lib/late_worker.py [--broker URL]`.

In: 200 tasks of 0.2 seconds, a worker that has begun them, and another that starts two seconds later. Out: seconds from
the second one's `ready` to the last result, and how many times the ideal that is: the tasks that are left, shared
evenly. The broker is an embedded Valkey if none is named; results are in one always.
"""

from __future__ import annotations

import argparse
import os
import time
import uuid
from pathlib import Path

from celery import Celery
from processes import Process, Processes, celery_command
from services import start_broker

TASKS, SECONDS, LATE = 200, 0.2, 2.0
FOLDER = Path(__file__).with_name("slow_app")
#: Seconds for a worker's start, and for all results.
START, END = 60, 120


def main() -> None:
    """Parse the arguments, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock", action="store_true", help="stock Celery's workers")
    parser.add_argument("--broker", help="an address, as for Celery")
    chosen = parser.parse_args()
    with Processes() as processes:
        results = f"{start_broker(processes)}/0"
        settings = {
            "BROKER": chosen.broker or results,
            "RESULTS": results,
            "QUEUE": f"slow-{uuid.uuid4().hex}",
            "LEGIT_WORKER_ENABLED": str(int(not chosen.stock)),
        }
        client = Celery(broker=settings["BROKER"], backend=results)
        _ready(_worker(processes, "first", settings))
        sent = [client.send_task("slow.wait", [SECONDS], queue=settings["QUEUE"]) for _ in range(TASKS)]
        time.sleep(LATE)
        second = _worker(processes, "second", settings)
        begin = _ready(second)
        ends = [(pid, at) for pid, at in (one.get(timeout=END) for one in sent) if at > begin]
        seconds, ideal = max(at for _, at in ends) - begin, len(ends) * SECONDS / 2
        others = sum(pid == second.pid for pid, _ in ends)
        print(f"{len(ends)} tasks were left, and {others} of them ran in the second worker.")
        print(f"The last one ended after {seconds:.1f} s: {seconds / ideal:.2f} times the ideal.")


def _worker(processes: Processes, name: str, settings: dict[str, str]) -> Process:
    command = [celery_command(), "-A", "slow_project", "worker", "--pool=solo", "--loglevel=INFO", "-n", f"{name}@%h"]
    return processes.start(name, command, os.environ | settings, FOLDER)


def _ready(worker: Process) -> float:
    deadline = time.monotonic() + START
    while " ready." not in worker.log.read_text():
        worker.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"{worker.name} is not ready after {START} s")
        time.sleep(0.01)
    return time.time()


if __name__ == "__main__":
    main()
