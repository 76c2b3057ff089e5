"""One comparison, from its texts to its figures.

In: the project's app, a model's alias, a reference. Out: what came of each path. Afterwards the worker is gone, and its
queues are.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.backends.rpc import RPCBackend
from celery.result import AsyncResult

from legit_worker.validation.comparison import Answer, Comparison, Failed, Tolerance, compare
from legit_worker.validation.mailboxes import Mailboxes, usable
from legit_worker.validation.paths import ROUTES, STOCK, opened
from legit_worker.validation.reference import Reference, ValidationError
from legit_worker.validation.worker import PrivateWorker, ending_by_exception

#: Seconds between two looks for answers.
PAUSE = 0.05

#: Seconds that the worker may take to say how many batches it ran. It has nothing else to do by then.
INSPECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a comparison."""

    #: By path.
    comparisons: Mapping[str, Comparison]
    #: By path that was not tried: why.
    skipped: Mapping[str, str]
    #: Batches and items that the worker's pool counted; None where it did not say.
    batches: int | None
    items: int | None

    @property
    def agrees(self) -> bool:
        """Whether no row of any path is wrong."""
        return not any(comparison.findings for comparison in self.comparisons.values())


@dataclass
class _Letters:
    """The tasks that were sent, and what came back."""

    #: By task id: path and row.
    sent: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: Those whose result Celery's backend will have.
    results: list[AsyncResult[Any]] = field(default_factory=list)
    answers: dict[str, dict[int, Answer]] = field(default_factory=dict)
    #: Of tasks that have an answer. A path delivers at least once: a second copy says nothing new.
    answered: set[str] = field(default_factory=set)

    def note(self, task_id: str, path: str, answer: Answer) -> None:
        expected_path, row = self.sent.get(task_id, ("", -1))
        if expected_path == path and task_id not in self.answered:
            self.answered.add(task_id)
            self.answers[path][row] = answer


def validate(
    app: Celery, project: str, alias: str, reference: Reference, tolerance: Tolerance, patience: float
) -> Outcome:
    """Every text by every path. `patience`: seconds to wait for the next answer, the first one's model load included.

    Raises `ValidationError` where a server can't be used, or the worker can't be started or can't do the task.
    """
    run = f"legit-validate-{uuid.uuid4().hex[:12]}"
    with usable("the result backend"):
        skipped = _skipped(app)
        _look_into(app, run)
    letters = _Letters()
    with ending_by_exception(), Mailboxes(app, run) as mailboxes, _telling_of_loss(mailboxes):
        try:
            _send(app, mailboxes.tasks, alias, reference.texts, letters, with_stock=not skipped)
            with PrivateWorker(project, mailboxes.tasks, f"{run}@%h", _variables(run)) as worker:
                _collect(mailboxes, worker, letters, patience)
                counted = _counted(app, run, alias)
        finally:
            _forget(letters)
    comparisons = {path: compare(reference.vectors, letters.answers[path], tolerance) for path in letters.answers}
    return Outcome(comparisons=comparisons, skipped=skipped, batches=counted.get("batches"), items=counted.get("items"))


def _skipped(app: Celery) -> dict[str, str]:
    if isinstance(app.backend, DisabledBackend):
        return {STOCK: "the project has no result backend"}
    if isinstance(app.backend, CacheBackend) and app.backend.backend == "memory":
        return {STOCK: "the project's results stay in the worker's own memory"}
    return {}


def _look_into(app: Celery, run: str) -> None:
    """Raises what the result backend's absence raises. Celery itself would try again for long."""
    if not isinstance(app.backend, DisabledBackend | RPCBackend):  # rpc:// is the broker
        app.backend.get_state(run)


@contextmanager
def _telling_of_loss(mailboxes: Mailboxes) -> Iterator[None]:
    try:
        yield
    except mailboxes.away as error:
        raise ValidationError(f"a server went away in mid-run: {type(error).__name__}: {error}") from error


def _variables(run: str) -> dict[str, str]:
    """Of the worker, beside those of this process: a device worker that routes, and that finds the app in one place."""
    chosen = {
        "LEGIT_WORKER_ENABLED": "1",
        "LEGIT_WORKER_ROLE": "device",
        "LEGIT_WORKER_APP_FROM": "header:app",
        "LEGIT_WORKER_METRICS_PORT": "off",
    }
    for route in ROUTES:
        chosen |= route.variables(run)
    return chosen


def _send(app: Celery, queue: str, alias: str, texts: list[str], letters: _Letters, *, with_stock: bool) -> None:
    """All at once and before the worker starts, so that its batches mix texts and paths."""
    paths: dict[str, dict[str, str]] = {STOCK: {}} if with_stock else {}
    paths |= {route.name: {"app": route.app} for route in ROUTES}
    letters.answers = {path: {} for path in paths}
    for row, text in enumerate(texts):
        for path, headers in paths.items():
            result = app.send_task(
                "legit_worker.embed_text", (text, alias), queue=queue, headers=headers, ignore_result=path != STOCK
            )
            letters.sent[result.id] = (path, row)
            if path == STOCK:
                letters.results.append(result)


def _collect(mailboxes: Mailboxes, worker: PrivateWorker, letters: _Letters, patience: float) -> None:
    """Until all answers are there, or none has come for so many seconds."""
    waiting = list(reversed(letters.results))
    deadline = time.monotonic() + patience
    while len(letters.answered) < len(letters.sent) and time.monotonic() < deadline:
        before = len(letters.answered)
        for task_id, path, answer in (*_routed(mailboxes), *_stored(waiting)):
            letters.note(task_id, path, answer)
        if len(letters.answered) > before:
            deadline = time.monotonic() + patience
        else:
            worker.check()
            time.sleep(PAUSE)


def _routed(mailboxes: Mailboxes) -> Iterator[tuple[str, str, Answer]]:
    for route, content in mailboxes.read():
        try:
            task_id, answer = opened(route, content)
        except ValueError as error:
            raise ValidationError(f"path {route.name} delivered what its consumer can't read: {error}") from None
        yield task_id, route.name, answer


def _stored(waiting: list[AsyncResult[Any]]) -> Iterator[tuple[str, str, Answer]]:
    """In the order in which they were sent, which is about the order of their ends."""
    while waiting and waiting[-1].ready():
        result = waiting.pop()
        yield result.id, STOCK, result.result if result.successful() else Failed(_told(result))


def _told(result: AsyncResult[Any]) -> str:
    return f"{result.state}: {type(result.result).__name__}: {result.result}"


def _forget(letters: _Letters) -> None:
    """The project's result backend need not keep them."""
    with suppress(Exception):  # one that can't, or is gone, keeps them until they expire
        for result in letters.results:
            result.forget()


def _counted(app: Celery, run: str, alias: str) -> dict[str, Any]:
    """What the worker's pool counted for the model."""
    replies = app.control.inspect(timeout=INSPECT_SECONDS, limit=1, pattern=f"{run}@*", matcher="glob").stats() or {}
    for name, stats in replies.items():
        if name.startswith(run):
            counted: dict[str, Any] = stats.get("pool", {}).get("models", {}).get(alias, {})
            return counted
    return {}
