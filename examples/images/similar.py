"""Sort images by how similar they are to the first one: `python similar.py FIRST OTHER ...`.

In: image files. Out: the names of the others, the most similar first. The client needs Celery and numpy alone.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import numpy as np
from celery import Celery

#: Seconds to wait for the answer. The first one takes longest, since the worker loads the model.
PATIENCE = 60

app = Celery(broker="redis://localhost:6379/0", backend="redis://localhost:6379/0")
files = [base64.b64encode(Path(name).read_bytes()).decode() for name in sys.argv[1:]]
vectors = np.array(app.send_task("legit_worker.embed_image", [files], {"normalize": True}).get(timeout=PATIENCE))
# The vectors have length 1, so a product is a cosine.
cosines = vectors[1:] @ vectors[0]
for place in np.argsort(-cosines):
    print(sys.argv[2:][place])
