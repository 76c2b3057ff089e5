"""The project with tasks that hold something across a model call: a connection of a small pool, or one of two locks.

In: `PROJECT_POOL_SECONDS`, how long one waits for either; there are two of both. Out: a number from the database.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from custom_models import Upper
from project import app
from sqlalchemy import create_engine, text
from sqlalchemy.pool import QueuePool

import legit_worker
from legit_worker.prep import processes

__all__ = ["app"]

PATIENCE = float(os.environ["PROJECT_POOL_SECONDS"])

locks = threading.BoundedSemaphore(2)

engine = create_engine(
    "sqlite:///:memory:",
    poolclass=QueuePool,
    pool_size=2,
    max_overflow=0,
    pool_timeout=PATIENCE,
    connect_args={"check_same_thread": False},
)


class Lengthy(Upper):
    """Takes long for a batch."""

    def forward(self, batch: Sequence[Any]) -> list[Any]:
        """As the others, later."""
        time.sleep(1.5)
        return super().forward(batch)


@app.task(name="holds_a_connection")
def holds_a_connection(number: int) -> int:
    """Under stock solo no other task runs meanwhile, and one connection is plenty."""
    with engine.connect() as connection:
        legit_worker.model("sim").map([number])
        return int(connection.execute(text(f"select {number:d}")).scalar_one())


@app.task(name="holds_a_lock")
def holds_a_lock(number: int) -> int:
    """The same with what nobody but the task knows of."""
    if not locks.acquire(timeout=PATIENCE):
        raise TimeoutError("both locks are taken")
    try:
        legit_worker.model("sim").map([number])
        return number
    finally:
        locks.release()


@app.task(name="holds_one_alone")
def holds_one_alone(number: int) -> int:
    """The way out."""
    with legit_worker.exclusive():
        return int(holds_a_lock.run(number))


@app.task(name="alone")
def alone(item: str, alias: str) -> Any:
    """Model calls in an exclusive section, during which nobody else can go on, and which end by themselves."""
    with legit_worker.exclusive():
        return [legit_worker.model(alias).map([f"{item} {number}"])[0] for number in range(2)]


@app.task(name="helped_alone")
def helped_alone(seconds: float) -> None:
    """A helper process, waited for in an exclusive section."""
    with legit_worker.exclusive():
        processes.run(time.sleep, seconds, size=1)


@app.task(name="computes")
def computes(seconds: float) -> None:
    """Its own code, for so long."""
    time.sleep(seconds)
