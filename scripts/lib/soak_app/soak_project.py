"""A project whose worker also says how many greenlets and which bytes of weights it has: `scripts/soak`."""

from __future__ import annotations

import gc
import os

from celery import Celery
from greenlet import greenlet

import legit_worker
from legit_worker.models.registry import default_registry

app = Celery("soak", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
legit_worker.install(app)


@app.task(name="soak.embed")
def embed(text: str, alias: str) -> list[float]:
    """One vector."""
    return legit_worker.model(alias).encode(text).tolist()


@app.task(name="soak.look")
def look() -> dict[str, int]:
    """Greenlets that are alive once what is garbage is collected, and bytes of the weights in memory."""
    gc.collect()
    greenlets = sum(isinstance(one, greenlet) for one in gc.get_objects())
    return {"greenlets": greenlets, "weights": default_registry().residency.report()["weights"] or 0}
