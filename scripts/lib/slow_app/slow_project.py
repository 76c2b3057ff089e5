"""A project whose one task takes 0.2 seconds of its own code: `scripts/lib/late_worker.py`."""

from __future__ import annotations

import os
import time

from celery import Celery

import legit_worker

app = legit_worker.install(Celery("slow", broker=os.environ["BROKER"], backend=os.environ["RESULTS"]))
app.conf.update(task_acks_late=True, task_default_queue=os.environ["QUEUE"])


@app.task(name="slow.wait")
def wait(seconds: float) -> tuple[int, float]:
    """Which process waited, and when it had."""
    time.sleep(seconds)
    return os.getpid(), time.time()
