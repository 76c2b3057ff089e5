"""The ready-made app: `celery -A legit_worker worker --pool=solo`, no project needed.

In: `CELERY_BROKER_URL` and `CELERY_RESULT_BACKEND`, Celery's own variables. Out: an app with the built-in tasks,
JSON only, enabled unless `LEGIT_WORKER_ENABLED=0`.
"""

from __future__ import annotations

from celery import Celery

from legit_worker import routes, settings, tasks
from legit_worker.install import enable

#: The URL of both, if the environment has none.
DEFAULT_URL = "redis://localhost:6379/0"

app = Celery("legit_worker")
app.conf.update(
    broker_url=DEFAULT_URL,
    result_backend=DEFAULT_URL,
    broker_connection_retry_on_startup=True,
    task_serializer="json",
    result_serializer="json",
    accept_content=["json"],
    worker_pool="solo",
)
if settings.is_enabled(default=True):
    enable(app)
chosen = settings.load_or_exit()
tasks.register(app, chosen)
if chosen.workers:
    app.conf.task_routes = (routes.by_model,)
