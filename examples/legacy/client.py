"""An app that sends texts, and prints each text's vectors as a line of JSON. It never changes.

It sends `python client.py shop`'s texts until SIGTERM, then waits for the answers that are still missing. It knows the
names of the tasks, the broker and the result backend, and nothing of workers.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys

from celery import Celery, chain

#: Texts on their way at the same time.
AT_ONCE = 16
#: Seconds to wait for one answer.
ANSWER_SECONDS = 120

celery = Celery(broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
name = sys.argv[1]
is_over = []
signal.signal(signal.SIGTERM, lambda *_: is_over.append(True))


def send(number: int) -> tuple:
    """One text through both stages."""
    text = f"product {number % 12} of the {name}: " + "a chair of red oak with a soft seat " * (number % 12)
    first = celery.signature("pipeline.prep", [text], {"app": name}, queue="prep")
    second = celery.signature("pipeline.embed", kwargs={"app": name}, queue="embed")
    return number, text, chain(first, second).apply_async()


waiting = []
for number in itertools.count():
    if not is_over:
        waiting.append(send(number))
    if is_over or len(waiting) == AT_ONCE:
        if not waiting:
            break
        number, text, result = waiting.pop(0)
        vectors = result.get(timeout=ANSWER_SECONDS)
        print(json.dumps({"number": number, "text": text, "vectors": vectors}), flush=True)
