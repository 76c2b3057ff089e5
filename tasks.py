from celery import Celery

import legit_worker

app = legit_worker.install(Celery("tasks", broker="redis://localhost", backend="redis://localhost"))


@app.task
def embed(text: str) -> list[float]:
    return legit_worker.model("minilm").encode(text).tolist()
