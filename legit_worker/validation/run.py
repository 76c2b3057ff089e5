"""One comparison, from its texts to its figures.

In: the project's app, a model's alias, a reference. Out: the figures of each path. Afterwards the worker and its queues
are gone.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.backends.rpc import RPCBackend
from celery.result import AsyncResult

from legit_worker.validation.comparison import Answer, Comparison, Failed, Tolerance, compare
from legit_worker.validation.forms import Row
from legit_worker.validation.mailboxes import Mailboxes, usable
from legit_worker.validation.paths import ROUTES, STOCK, opened
from legit_worker.validation.reference import Reference, ValidationError
from legit_worker.validation.worker import PrivateWorker, ending_by_exception

#: Seconds between two looks for answers.
PAUSE = 0.05

#: Seconds for the worker to tell how many batches it ran. It is idle by then.
INSPECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a comparison."""

    #: By path.
    comparisons: Mapping[str, Comparison]
    #: The reason, by path that was not tried.
    skipped: Mapping[str, str]
    #: The batches and items that the worker's pool counted; None if it did not answer.
    batches: int | None
    items: int | None
    #: What computed them, as `openvino float32`; None likewise.
    backend: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether every row of every path is right."""
        return not any(comparison.findings for comparison in self.comparisons.values())


@dataclass
class _Letters:
    """The tasks that were sent, and their answers."""

    #: By task id: path and row.
    sent: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: The tasks whose result Celery's backend stores.
    results: list[AsyncResult[Any]] = field(default_factory=list)
    answers: dict[str, dict[int, Answer]] = field(default_factory=dict)
    #: The ids of answered tasks. A path may deliver an answer twice, and the second copy is ignored.
    answered: set[str] = field(default_factory=set)

    def note(self, task_id: str, path: str, answer: Answer) -> None:
        expected_path, row = self.sent.get(task_id, ("", -1))
        if expected_path == path and task_id not in self.answered:
            self.answered.add(task_id)
            self.answers[path][row] = answer


def validate(
    app: Celery,
    project: str,
    alias: str,
    reference: Reference,
    tolerance: Tolerance,
    patience: float,
    tell: Callable[[int, int], object],
) -> Outcome:
    """Send every input by every path, and compare. `patience`: seconds for the next answer, and for the model's load.

    `tell` is called with the number of answers so far, and of all. Raises `ValidationError` if a server can't be used,
    or if the worker can't start or can't do the task.
    """
    run = f"legit-validate-{uuid.uuid4().hex[:12]}"
    with usable("the result backend"):
        skipped = _skipped(app)
        _look_into(app, run)
    letters = _Letters()
    with ending_by_exception(), Mailboxes(app, run) as mailboxes, _telling_of_loss(mailboxes):
        try:
            _send(app, mailboxes.tasks, alias, reference.rows, letters, with_stock=not skipped)
            with PrivateWorker(project, mailboxes.tasks, f"{run}@%h", _variables(run)) as worker:
                worker.start()
                _collect(mailboxes, worker, letters, patience, tell)
                counted = _counted(app, run, alias)
        finally:
            _forget(letters)
    told = {name: counted.get(name) for name in ("batches", "items", "backend")}
    return Outcome(comparisons=_compared(reference, letters, tolerance), skipped=skipped, **told)


def _compared(reference: Reference, letters: _Letters, tolerance: Tolerance) -> dict[str, Comparison]:
    right = [row.right for row in reference.rows]
    return {path: compare(right, answers, tolerance, reference.form) for path, answers in letters.answers.items()}


def _skipped(app: Celery) -> dict[str, str]:
    if isinstance(app.backend, DisabledBackend):
        return {STOCK: "the project has no result backend"}
    if isinstance(app.backend, CacheBackend) and app.backend.backend == "memory":
        return {STOCK: "the project's results stay in the worker's own memory"}
    return {}


def _look_into(app: Celery, run: str) -> None:
    """Raise at once if the result backend is away. Celery itself would try again for long."""
    if not isinstance(app.backend, DisabledBackend | RPCBackend):  # rpc:// is the broker
        app.backend.get_state(run)


@contextmanager
def _telling_of_loss(mailboxes: Mailboxes) -> Iterator[None]:
    try:
        yield
    except mailboxes.away as error:
        raise ValidationError(f"a server went away in mid-run: {type(error).__name__}: {error}") from error


def _variables(run: str) -> dict[str, str]:
    """Return the worker's additional variables: it runs models, routes, and finds the app in one header."""
    chosen = {
        "LEGIT_WORKER_ENABLED": "1",
        "LEGIT_WORKER_ROLE": "device",
        "LEGIT_WORKER_APP_FROM": "header:app",
        "LEGIT_WORKER_METRICS_PORT": "off",
    }
    for route in ROUTES:
        chosen |= route.variables(run)
    return chosen


def _send(app: Celery, queue: str, alias: str, rows: Sequence[Row], letters: _Letters, *, with_stock: bool) -> None:
    """Send all tasks before the worker starts, so that its batches mix texts and paths."""
    paths: dict[str, dict[str, str]] = {STOCK: {}} if with_stock else {}
    paths |= {route.name: {"app": route.app} for route in ROUTES}
    letters.answers = {path: {} for path in paths}
    for place, row in enumerate(rows):
        for path, headers in paths.items():
            result = app.send_task(
                f"legit_worker.{row.form.task}",
                kwargs={**row.asked, "model": alias},
                queue=queue,
                headers=headers,
                ignore_result=path != STOCK,
            )
            letters.sent[result.id] = (path, place)
            if path == STOCK:
                letters.results.append(result)


def _collect(
    mailboxes: Mailboxes,
    worker: PrivateWorker,
    letters: _Letters,
    patience: float,
    tell: Callable[[int, int], object],
) -> None:
    """Collect until all answers are there, or until no answer has come for `patience` seconds."""
    waiting = list(reversed(letters.results))
    deadline = time.monotonic() + patience
    while len(letters.answered) < len(letters.sent) and time.monotonic() < deadline:
        before = len(letters.answered)
        for task_id, path, answer in (*_routed(mailboxes), *_stored(waiting)):
            letters.note(task_id, path, answer)
        tell(len(letters.answered), len(letters.sent))
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
    """Take finished results in the order in which they were sent: they end in about this order."""
    while waiting and waiting[-1].ready():
        result = waiting.pop()
        yield result.id, STOCK, result.result if result.successful() else Failed(_told(result))


def _told(result: AsyncResult[Any]) -> str:
    return f"{result.state}: {type(result.result).__name__}: {result.result}"


def _forget(letters: _Letters) -> None:
    """Delete the results from the project's backend."""
    with suppress(Exception):  # a backend that can't, or is away, keeps them until they expire
        for result in letters.results:
            result.forget()


def _counted(app: Celery, run: str, alias: str) -> dict[str, Any]:
    """Return the pool's counters for the model."""
    replies = app.control.inspect(timeout=INSPECT_SECONDS, limit=1, pattern=f"{run}@*", matcher="glob").stats() or {}
    for name, stats in replies.items():
        if name.startswith(run):
            models: dict[str, dict[str, Any]] = stats.get("pool", {}).get("models", {})
            own = models.get(alias, {})
            return models.get(own.get("shares", alias), own)
    return {}
