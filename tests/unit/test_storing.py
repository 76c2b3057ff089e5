"""Result backends that are not Redis: who waits while they raise errors, who tries, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, states
from celery.backends.base import KeyValueStoreBackend
from greenlet import getcurrent, greenlet
from kombu.exceptions import EncodeError

from legit_worker import parking
from legit_worker.pool.storing import store_patiently
from legit_worker.results import patience
from legit_worker.results.backend import away_since, is_refused
from legit_worker.results.patience import MOST_REFUSALS, RefusedStateError


class LibraryError(Exception):
    """What a database's library raises while the database is away."""


class Backend(KeyValueStoreBackend):
    """Keeps states in a dictionary."""

    implements_incr = True

    def __init__(self) -> None:
        super().__init__(app=Celery(set_as_current=False))
        self.error: Exception | None = None
        #: Ids of tasks whose states are refused.
        self.refused: dict[str, Exception] = {}
        #: Which states were tried, and which are stored, in their order.
        self.tried: list[tuple[str, str]] = []
        self.stored: list[tuple[str, str]] = []

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        self.tried.append((task_id, state))
        if error := self.error or self.refused.get(task_id):
            raise error
        self.stored.append((task_id, state))


class Tasks(parking.Host):
    """Parks each task in a greenlet of its own."""

    def __init__(self) -> None:
        self.parked: list[tuple[greenlet, Future[None]]] = []
        self.errors: list[Exception] = []
        self.looks: list[Future[None]] = []

    def start(self, call: Callable[[], Any]) -> None:
        """Run a task until it parks or ends."""

        def run() -> None:
            try:
                call()
            except Exception as error:
                self.errors.append(error)

        greenlet(run).switch()

    def park(self, done: Future[None], what: str, counts: bool) -> bool:
        if done.done():
            return True
        self.parked.append((getcurrent(), done))
        getcurrent().parent.switch()
        return True

    @property
    def is_around_task(self) -> bool:
        return getcurrent().parent is not None

    def later(self) -> Future[None]:
        """As `patience.later`."""
        if not self.looks:
            self.looks.append(Future())
        return self.looks[0]

    def look(self) -> None:
        """Let half a second pass."""
        for done in self.looks:
            done.set_result(None)
        self.looks.clear()
        parked, self.parked = self.parked, []
        for task, _ in parked:
            task.switch()


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tasks]:
    host = Tasks()
    monkeypatch.setattr(patience, "later", host.later)
    parking.use(host)
    undo = store_patiently()
    yield host
    undo()
    parking.stop()


@pytest.fixture
def backend() -> Backend:
    return Backend()


Store = Callable[..., None]


@pytest.fixture
def store(tasks: Tasks, backend: Backend) -> Store:
    """Has a task store a state."""

    def run(task_id: str, state: str = states.SUCCESS) -> None:
        tasks.start(lambda: backend.store_result(task_id, "result", state))

    return run


@pytest.mark.parametrize("error", [ConnectionRefusedError("nobody"), PermissionError("no"), LibraryError("away")])
def test_tasks_wait_for_a_backend_that_is_away_and_one_of_them_tries_at_each_look(
    tasks: Tasks, backend: Backend, store: Store, error: Exception
) -> None:
    backend.error = error
    for number in range(5):
        store(f"task{number}")
    assert backend.tried == [("task0", states.SUCCESS)]
    assert away_since() is not None
    for _ in range(6):
        tasks.look()
    assert [task for task, _ in backend.tried] == [f"task{number}" for number in (0, 1, 2, 3, 4, 0, 1)]
    backend.error = None
    for _ in range(2):
        tasks.look()
    assert sorted(backend.stored) == [(f"task{number}", states.SUCCESS) for number in range(5)]
    assert not tasks.errors
    assert away_since() is None


def test_the_states_of_one_task_keep_their_order(tasks: Tasks, backend: Backend, store: Store) -> None:
    """The next attempt of a retried task may be in this worker at once."""
    backend.error = OSError("away")
    store("other")
    store("one", states.RETRY)
    tasks.look()
    store("one", states.FAILURE)
    backend.error = None
    for _ in range(3):
        tasks.look()
    assert [state for task, state in backend.stored if task == "one"] == [states.RETRY, states.FAILURE]


def test_who_comes_while_others_wait_does_not_try_before_the_next_look(
    tasks: Tasks, backend: Backend, store: Store
) -> None:
    backend.error = OSError("away")
    store("first")
    backend.error = None
    store("second")
    assert len(backend.tried) == 1
    for _ in range(2):
        tasks.look()
    assert len(backend.stored) == 2
    store("third")
    assert len(backend.stored) == 3


@pytest.mark.parametrize("error", [ValueError("odd"), EncodeError("odd"), MemoryError()])
def test_an_error_over_a_tasks_data_is_the_tasks_at_once(
    tasks: Tasks, backend: Backend, store: Store, error: Exception
) -> None:
    backend.error = error
    store("task")
    assert tasks.errors == [error]


def test_an_error_in_a_backends_code_is_one_tasks_refusal(tasks: Tasks, backend: Backend, store: Store) -> None:
    backend.error = RuntimeError("a bug")
    store("task")
    assert [(type(error), is_refused(error)) for error in tasks.errors] == [(RefusedStateError, True)]


def test_what_a_backend_refuses_again_and_again_while_it_takes_others_fails(
    tasks: Tasks, backend: Backend, store: Store
) -> None:
    backend.refused["bad"] = OSError(36, "File name too long")
    store("bad")
    tasks.look()
    assert not tasks.errors, "nobody knows whether the backend is away"
    for number in range(MOST_REFUSALS):
        assert not tasks.errors, "the backend may have been there for a moment"
        store(f"good{number}")
        for _ in range(2):
            tasks.look()
    assert [type(error) for error in tasks.errors] == [RefusedStateError]
    assert len(backend.stored) == MOST_REFUSALS
    assert away_since() is None


def test_who_can_not_park_stores_as_celery_does(tasks: Tasks, backend: Backend) -> None:
    backend.error = OSError("away")
    with pytest.raises(OSError, match="away"):
        backend.store_result("task", None, states.SUCCESS)


def test_the_log_says_once_a_minute_that_a_backend_is_away(
    tasks: Tasks, backend: Backend, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error = OSError("away")
    with caplog.at_level(logging.WARNING):
        for number in range(50):
            store(f"task{number}")
            tasks.look()
    assert [record.getMessage() for record in caplog.records] == [
        "Backend takes no results, for 0 s by now, and the tasks wait until it does: OSError('away')"
    ]


class Chords(Backend):
    """Stores a state while it counts a chord's part, as Celery does if a chord fails."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def restore_group(self, *args: Any, **kwargs: Any) -> Any:
        self.store_result("body", None, states.FAILURE)
        return [self]

    def incr(self, key: bytes) -> int:
        if self.error:
            raise self.error
        self.counted += 1
        return self.counted

    def expire(self, key: bytes, value: int) -> None:
        """Keep it."""


def test_a_chords_part_waits_until_it_is_counted_and_not_for_itself(tasks: Tasks) -> None:
    backend = Chords()
    request = SimpleNamespace(id="part", group="group", chord={"chord_size": 2})
    backend.error = OSError("away")
    tasks.start(lambda: backend.store_result("other", None, states.SUCCESS))
    tasks.start(lambda: backend.on_chord_part_return(request, states.SUCCESS, None))
    for _ in range(5):
        tasks.look()
    assert backend.counted == 0
    backend.error = None
    for _ in range(3):
        tasks.look()
    assert (backend.counted, tasks.errors, tasks.parked) == (1, [], [])
