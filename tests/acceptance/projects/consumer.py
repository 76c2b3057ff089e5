"""An app of its own that wants results as Celery tasks. It knows nothing of legit_worker.

In: Celery's own environment variables, and `CONSUMER_FILE`. Out: each envelope as one line of that file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celery import Celery

app = Celery("consumer", broker=os.environ["CELERY_BROKER_URL"])
app.conf.task_default_queue = os.environ["PROJECT_QUEUE"]
app.conf.broker_transport_options = json.loads(os.environ["PROJECT_TRANSPORT_OPTIONS"])


@app.task(name="vodmanager.embedding_ready", bind=True)
def embedding_ready(self: Any, envelope: dict[str, Any]) -> None:
    """Keeps the envelope, and what Celery says of its message."""
    seen = {"envelope": envelope, "id": self.request.id, "retries": self.request.retries}
    with Path(os.environ["CONSUMER_FILE"]).open("a") as file:
        file.write(json.dumps(seen) + "\n")
