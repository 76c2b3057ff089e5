"""A Celery project that was there before: texts are cleaned and cut in one stage, and embedded in the next.

Two lines are legit_worker's: `install`, and the model behind `minilm`. Without variables, both do what stock Celery and
sentence-transformers do.
"""

from __future__ import annotations

import os

from celery import Celery

import legit_worker

app = Celery("pipeline", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
app.conf.task_routes = {"pipeline.prep": "prep", "pipeline.embed": "embed"}
legit_worker.install(app)
minilm = legit_worker.model("minilm")  # it was SentenceTransformer("all-MiniLM-L6-v2")

#: Words in one chunk.
CHUNK_WORDS = 40


@app.task(name="pipeline.prep")
def prep(text: str, app: str = "") -> list[str]:
    """Clean a text, and cut it into chunks. `app` says for whom."""
    words = text.split()
    return [" ".join(words[start : start + CHUNK_WORDS]) for start in range(0, len(words), CHUNK_WORDS)]


@app.task(name="pipeline.embed")
def embed(chunks: list[str], app: str = "") -> list[list[float]]:
    """One vector for each chunk."""
    return minilm.encode(chunks).tolist()
