"""What legit_worker is compared with: a plain Celery project, as one would write it without legit_worker.

In: the same messages (the task has the same name). Out: the same vectors, one text at a time. Broker and result backend
come from CELERY_BROKER_URL and CELERY_RESULT_BACKEND, the model from MODEL_PATH; all other settings are Celery's own.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from celery import Celery

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

app = Celery("stock_project")


@cache
def loaded(name: str) -> SentenceTransformer:
    """Loaded by the first task that names it, and kept. All names are the same weights, each with a copy of its own."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(os.environ["MODEL_PATH"])


@app.task(name="legit_worker.embed_text")
def embed_text(text: str | list[str], model: str = "minilm") -> list[float]:
    return loaded(model).encode(text).tolist()


@cache
def reranker() -> CrossEncoder:
    """The same, of RERANKER_PATH."""
    from sentence_transformers import CrossEncoder

    return CrossEncoder(os.environ["RERANKER_PATH"])


@app.task(name="legit_worker.rerank")
def rerank(query: str, documents: list[str]) -> list[dict[str, int | float]]:
    scores = reranker().predict([(query, document) for document in documents])
    return [{"index": index, "score": float(score)} for index, score in enumerate(scores)]
