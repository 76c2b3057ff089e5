"""Sort documents by how well they answer a question, the best first: `python search.py QUESTION < DOCUMENTS`.

In: one document on each line. Out: scores and documents. The client needs Celery alone, and knows a task's name.
"""

from __future__ import annotations

import sys

from celery import Celery

#: Seconds to wait for the answer. The first one takes longest, since the worker loads the model.
PATIENCE = 60

app = Celery(broker="redis://localhost:6379/0", backend="redis://localhost:6379/0")
documents = sys.stdin.read().splitlines()
ranked = app.send_task("legit_worker.rerank", [sys.argv[1], documents]).get(timeout=PATIENCE)
for one in ranked:
    print(f"{one['score']:.2f}  {documents[one['index']]}")
