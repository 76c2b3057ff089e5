"""What a worker shows to Prometheus and to an orchestrator's probes. Off unless `LEGIT_WORKER_METRICS_PORT` is set.

In: what the worker's parts know already, read when somebody asks. Out: `/metrics`, `/healthz` and `/readyz` over HTTP,
from a thread that takes no lock which the main thread waits for.
"""

from __future__ import annotations

import importlib.util

from celery import Celery


def enable(app: Celery) -> None:
    """Let this app's workers serve metrics. Called before the worker's consumer is made; twice is as good as once.

    Ends the process with a sentence if prometheus-client is missing.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise SystemExit(
            "legit_worker: LEGIT_WORKER_METRICS_PORT needs prometheus_client, not installed in this Python: "
            "pip install 'legit-worker[metrics]'"
        )
    from legit_worker.metrics.step import MetricsStep

    app.steps["consumer"].add(MetricsStep)
