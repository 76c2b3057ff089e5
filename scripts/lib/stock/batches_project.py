"""celery-batches, as its documentation writes it: the task gets many requests, and stores each one's result.

In: the same messages as `stock_project.py`. Batches of up to 64, gathered for at most `FLUSH_SECONDS`. Acks are early,
as by default, and a worker holds two batches of messages.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery_batches import Batches

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

#: Messages in one batch, and seconds that the first of them waits for the others.
FLUSH_EVERY, FLUSH_SECONDS = 64, 0.02

app = Celery("batches_project")
app.conf.worker_prefetch_multiplier = 2 * FLUSH_EVERY


@cache
def model() -> SentenceTransformer:
    """Loaded by the first batch, and kept."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(os.environ["MODEL_PATH"])


@app.task(name="legit_worker.embed_text", base=Batches, flush_every=FLUSH_EVERY, flush_interval=FLUSH_SECONDS)
def embed_text(requests: list[Any]) -> None:
    items = [request.args[0] for request in requests]
    texts = [text for item in items for text in ([item] if isinstance(item, str) else item)]
    rows = iter(model().encode(texts, show_progress_bar=False).tolist())
    for request, item in zip(requests, items, strict=True):
        result = next(rows) if isinstance(item, str) else [next(rows) for _ in item]
        app.backend.mark_as_done(request.id, result, request=request)
