"""What a worker on the project `life` noted, and how to ask for it.

In: the file that the worker was given. Out: the notes in their order, all or one task's; and workers of both sides that
differ in one variable only, each with its journal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery.result import AsyncResult
from harness import SIDES, SIMULATED, Broker, StartWorker, Worker, poll

#: What Celery's `Request` does with a message in the end.
ANSWERS = ("acks", "rejects")

#: Both sides ack late, as ModelPool does by itself, so that their tasks' notes can be compared. No model needs torch.
SAME = {"LEGIT_WORKER_DEVICE": "cpu", "PROJECT_ACKS_LATE": "1"}

Note = list[Any]


@dataclass(frozen=True)
class Journal:
    """A file of JSON lines. One worker writes it, and a test reads it."""

    path: Path

    def notes(self) -> list[Note]:
        """All that is whole: the task's id or None, what happened, and details."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def of(self, task: str) -> list[Note]:
        """One task's notes, without its id."""
        return [rest for of, *rest in self.notes() if of == task]

    def happened(self, name: str) -> list[str]:
        """The tasks to which this happened, in that order."""
        return [task for task, what, *_ in self.notes() if what == name]

    def answers_of(self, task: str) -> int:
        """How many of this task's messages were acked or rejected."""
        return sum(what in ANSWERS for what, *_ in self.of(task))

    def wait_for(self, task: str, name: str) -> None:
        """Until this happened to the task."""
        poll(lambda: task in self.happened(name), f"{name!r} of {task}")


@dataclass(frozen=True)
class Life:
    """A worker on the project `life`, and its journal."""

    side: str
    worker: Worker
    journal: Journal

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        """One task, with whatever options a client may give."""
        return self.worker.client.send_task(task, args, **options)

    def ask(self, task: str, *args: Any, **options: Any) -> Any:
        """One task's result, or its error raised."""
        return self.worker.answer(self.send(task, *args, **options))

    def end(self, result: AsyncResult[Any], messages: int = 1) -> list[Note]:
        """A task's notes, once so many messages of it were acked or rejected: nothing comes after that."""
        try:
            poll(lambda: self.journal.answers_of(result.id) >= messages, f"{messages} messages to be answered")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal.of(result.id)}\n{self.worker.tail()}") from None
        return self.journal.of(result.id)

    def anonymous(self, value: Any, *results: AsyncResult[Any]) -> Any:
        """Without what must differ between two workers: their names, queues and processes, and these tasks' ids."""
        text = json.dumps(value, default=repr)
        for number, result in enumerate(results):
            text = text.replace(result.id, f"id {number}")
        text = text.replace(self.worker.name, "worker").replace(self.worker.broker.queue, "queue")
        return json.loads(re.sub(rf"\b{self.worker.pid}\b", "0", text))


def begin_life(
    start: StartWorker,
    folder: Path,
    side: str,
    *arguments: str,
    broker: Broker | None = None,
    project: str = "life",
    conf: dict[str, Any] | None = None,
    wait: bool = True,
    **settings: str,
) -> Life:
    """A worker on this side. `conf` is more of Celery's settings."""
    journal = Journal(folder / f"{side}.journal")
    ours = {"PROJECT_JOURNAL": str(journal.path), "PROJECT_CONF": json.dumps(conf or {})}
    environment = SIMULATED | SAME | SIDES[side] | ours | settings
    return Life(side, start(project, *arguments, broker=broker, wait=wait, environment=environment), journal)


def begin_both(start: StartWorker, folder: Path, *arguments: str, **options: Any) -> dict[str, Life]:
    """One worker on each side, started at the same time."""
    lives = {side: begin_life(start, folder, side, *arguments, wait=False, **options) for side in SIDES}
    for life in lives.values():
        life.worker.wait_until_ready()
    return lives


def names(notes: Iterable[Note]) -> list[str]:
    """What happened, without details."""
    return [name for name, *_ in notes]
