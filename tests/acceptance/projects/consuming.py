"""The tests' project, with consumers of its own on the worker's broker.

In: Celery's own environment variables. Out: a consumer beside the tasks' one, which does not ack and keeps what it got;
and tasks that consume by themselves.
"""

from __future__ import annotations

from typing import Any

import kombu
from celery import bootsteps
from project import app

#: What the step's consumer got.
heard: list[Any] = []


def queue_of(name: str) -> kombu.Queue:
    """A queue that nobody else uses."""
    return kombu.Queue(f"{app.conf.task_default_queue}.{name}", durable=False)


class Listener(bootsteps.ConsumerStep):
    """Takes notes that nobody needs twice."""

    def get_consumers(self, channel: Any) -> list[kombu.Consumer]:
        """One that does not ack."""
        return [
            kombu.Consumer(channel, [queue_of("notes")], callbacks=[lambda body, _: heard.append(body)], no_ack=True)
        ]


app.steps["consumer"].add(Listener)


@app.task(name="notes")
def notes() -> list[Any]:
    """What the listener has heard."""
    return heard


@app.task(name="consumes")
def consumes(name: str, seconds: float) -> list[Any]:
    """Waits for one message of a queue, as a task does that talks to another program."""
    got: list[Any] = []
    with (
        app.connection_for_read() as connection,
        kombu.Consumer(connection, [queue_of(name)], callbacks=[lambda body, _: got.append(body)]),
    ):
        try:
            connection.drain_events(timeout=seconds)
        except TimeoutError:
            return ["nothing came"]
    return got
