"""A Celery project with one task, which calls the model by its alias."""

from __future__ import annotations

from celery import Celery

import legit_worker

app = legit_worker.install(Celery("tasks", broker="redis://localhost:6379/0", backend="redis://localhost:6379/0"))
language = legit_worker.model("language")


@app.task
def detect(text: str) -> str:
    """The language of a text."""
    return language.map([text])[0]
