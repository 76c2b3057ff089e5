"""A project for prep workers: the built-in tasks, and tasks that want CUDA.

In: as `project.py` does. Out: whatever the driver says, where it may be asked.
"""

from __future__ import annotations

import ctypes
import os

from celery import Celery

import legit_worker

app = Celery("prep", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
app.conf.update(
    task_default_queue=os.environ["PROJECT_QUEUE"],
    control_exchange=os.environ["PROJECT_QUEUE"],
    broker_connection_retry_on_startup=True,
)
legit_worker.install(app)


@app.task(name="opens_driver")
def opens_driver() -> int:
    """As a library of C's own would."""
    return int(ctypes.CDLL("libcuda.so.1").cuInit(0))


@app.task(name="asks_torch")
def asks_torch() -> str:
    """The question that opened the phantom context."""
    import torch

    return str(torch.cuda.get_device_properties(0))


@app.task(name="visible")
def visible() -> str | None:
    """What CUDA would see."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")
