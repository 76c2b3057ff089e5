import legit_worker
from celery import Celery

app = legit_worker.install(Celery("tasks", broker="redis://localhost", backend="redis://localhost"))

@app.task
def embed(text: str) -> list[float]:
    return legit_worker.model("minilm").encode(text).tolist()
