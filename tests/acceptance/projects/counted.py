"""The ordinary project, with tasks that say how often they run, and results of every kind that a server may get.

In: as `project`, and `PROJECT_CONF`: JSON for more of a project's settings. Out: the log has `ran NAME` for each run.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from project import app

import legit_worker

app.conf.update(json.loads(os.environ.get("PROJECT_CONF", "{}")))


@app.task(name="counted")
def counted(name: str) -> str:
    """Gives back its argument, without a model."""
    print(f"ran {name}", flush=True)
    return name


@app.task(name="computed")
def computed(name: str) -> str:
    """Gives back its argument, after a model call."""
    print(f"ran {name}", flush=True)
    legit_worker.model("sim").map([name])
    return name


@app.task(name="parked")
def parked(name: str) -> str:
    """Waits for a model that takes long to load."""
    print(f"ran {name}", flush=True)
    legit_worker.model("late").map([name])
    return name


@app.task(name="failing")
def failing(name: str) -> None:
    """Fails."""
    print(f"ran {name}", flush=True)
    raise ValueError(name)


@app.task(name="again", bind=True, max_retries=None)
def again(self: Any, name: str, gate: str) -> str:
    """Is sent again until a file is there."""
    print(f"ran {name}", flush=True)
    if not os.path.exists(gate):
        raise self.retry(countdown=0.1, retry_policy={"max_retries": 0})
    return name


@app.task(name="quiet", ignore_result=True)
def quiet(name: str) -> None:
    """Has no result."""
    print(f"ran {name}", flush=True)


@app.task(name="quietly_failing", ignore_result=True, store_errors_even_if_ignored=True)
def quietly_failing(name: str) -> None:
    """Has a result only if it fails."""
    raise ValueError(name)


@app.task(name="total")
def total(parts: list[str]) -> str:
    """A chord's body."""
    return "+".join(sorted(parts))


@app.task(name="limited", soft_time_limit=1)
def limited(name: str) -> str:
    """Runs into its time limit."""
    print(f"ran {name}", flush=True)
    time.sleep(60)
    return name


@app.task(name="large")
def large(name: str) -> str:
    """Gives two million characters."""
    print(f"ran {name}", flush=True)
    return "x" * 2 * 10**6


@app.task(name="odd")
def odd(name: str) -> Any:
    """Gives what Celery's JSON does not take, and an envelope's does."""
    print(f"ran {name}", flush=True)
    return _Listed()


class _Listed:
    def tolist(self) -> list[int]:
        return [1, 2, 3]
