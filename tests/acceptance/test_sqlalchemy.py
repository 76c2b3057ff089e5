"""A SQLAlchemy transaction across a model call is its own task's, under stock solo and under ModelPool, as written."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import SIDES, SIMULATED, StartWorker, Worker, run_python

#: Creates the tables.
CREATE = """
import stored
stored.Base.metadata.create_all(stored.engine)
with stored.Own.begin() as session:
    session.add(stored.Counter(id=1))
"""

#: Four times what a pool of SQLAlchemy's has connections by default.
TASKS = 60


@dataclass(frozen=True)
class Store:
    """A worker on the project, and its database."""

    side: str
    worker: Worker
    path: Path

    def ask(self, query: str, *values: Any) -> list[Any]:
        """What stands in the database."""
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(query, values).fetchall()

    def send(self, task: str, count: int = TASKS) -> list[Any]:
        """Many at once, of which every third fails."""
        return [self.worker.send(task, f"{task} {number}", number % 3 == 2) for number in range(count)]

    def check(self, task: str, answers: list[Any]) -> None:
        """Those that had to fail did, and left no row; the others stand."""
        expected = [number % 3 == 2 for number in range(len(answers))]
        assert [isinstance(answer, ValueError) for answer in answers] == expected, answers
        assert [answer for answer in answers if not isinstance(answer, ValueError)] == [None] * expected.count(False)
        stands = {f"{task} {number}" for number, fails in enumerate(expected) if not fails}
        rows = self.ask("select item, step from row where item like ?", f"{task} %")
        assert sorted(rows) == sorted((item, "after") for item in stands)


@pytest.fixture(scope="module", params=SIDES)
def store(
    request: pytest.FixtureRequest,
    start_module_worker: StartWorker,
    servers: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Store:
    """A worker under stock Celery and then one under ModelPool, each with a database of its own."""
    path = tmp_path_factory.mktemp("database") / "rows.sqlite3"
    broker = servers.fresh()
    environment = (
        SIDES[request.param]
        | SIMULATED
        | {
            "PROJECT_DATABASE": f"sqlite:///{path}",
            "LEGIT_WORKER_DEVICE": "cpu",
            # So slow that all tasks that may share a batch have come by the time it is over.
            "LEGIT_WORKER_MODELS__SIM__PATH": "0.01,0",
        }
    )
    run_python(CREATE, broker, environment)
    return Store(request.param, start_module_worker("stored", broker=broker, environment=environment), path)


@pytest.mark.parametrize("task", ["adds", "adds_scoped", "adds_by_one_session", "inserts", "reads_and_writes"])
def test_of_many_transactions_across_model_calls_each_stands_or_falls_alone(store: Store, task: str) -> None:
    store.check(task, store.worker.answers(store.send(task)))


def test_tasks_that_change_one_row_do_it_one_after_the_other(store: Store) -> None:
    before = store.ask("select value from counter")[0][0]
    store.check("counts", store.worker.answers(store.send("counts")))
    assert store.ask("select value from counter")[0][0] - before == TASKS * 2 / 3


@pytest.mark.parametrize("task", ["reads_and_more", "mixed"])
def test_tasks_share_batches_as_far_as_their_transactions_allow(store: Store, task: str) -> None:
    """Those that read first as far as there are connections; those without a database with all others."""
    before = store.worker.pool()
    names = {"reads_and_more": ["reads_and_writes"], "mixed": ["adds", "one"]}[task]
    results = [
        store.worker.send(name, f"{task} {name} {number}", *([] if name == "one" else [False]))
        for number in range(TASKS // 2)
        for name in names
    ]
    answers = store.worker.answers(results)
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    if store.side == "modelpool":
        after = store.worker.pool()
        assert after["items"] - before["items"] == len(results)
        # Of the mixed ones, those that add are one to a batch.
        alone = TASKS // 2 if task == "mixed" else 0
        assert after["batches"] - before["batches"] <= alone + (len(results) - alone) / 3
