"""A real Django project: a transaction across a model call is its own task's, under stock solo and under ModelPool."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import SIDES, SIMULATED, StartWorker, Worker, run_python

#: The steps of a task whose rows stand.
BOTH = ["before", "after"]

#: Creates the tables of both databases.
CREATE = """
import django; django.setup()
from django.core.management import call_command
for database in ("default", "other"):
    call_command("migrate", run_syncdb=True, database=database, verbosity=0)
"""

#: Enough that many are in flight at once.
TASKS = 40


@dataclass(frozen=True)
class Shop:
    """A worker on the project, and its databases."""

    side: str
    worker: Worker
    folder: Path

    def rows(self, prefix: str, database: str = "default") -> dict[str, list[str]]:
        """What stands in the database, in the order in which it was written: the steps of each item."""
        found: dict[str, list[str]] = {}
        query = "select item, step from djangoproject_row where item like ? order by id"
        with closing(sqlite3.connect(self.folder / f"{database}.sqlite3")) as connection:
            for item, step in connection.execute(query, [f"{prefix} %"]):
                found.setdefault(item, []).append(step)
        return found

    def run(self, task: str, prefix: str, *args: Any, **options: Any) -> list[Any]:
        """Forty tasks at once, of which every other fails."""
        results = [
            self.worker.client.send_task(task, [f"{prefix} {number}", number % 2 == 1, *args], **options)
            for number in range(TASKS)
        ]
        answers = self.worker.answers(results)
        failed = [isinstance(answer, ValueError) for answer in answers]
        assert failed == [number % 2 == 1 for number in range(TASKS)], answers
        return answers[::2]


@pytest.fixture(scope="module", params=SIDES)
def shop(
    request: pytest.FixtureRequest,
    start_module_worker: StartWorker,
    servers: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Shop:
    """A worker under stock Celery and then one under ModelPool, each with databases of its own."""
    folder = tmp_path_factory.mktemp("databases")
    broker = servers.fresh()
    environment = (
        SIDES[request.param]
        | SIMULATED
        | {
            "DJANGO_SETTINGS_MODULE": "djangoproject.settings",
            "PROJECT_DATABASES": str(folder),
            "LEGIT_WORKER_DEVICE": "cpu",
            # So slow that all tasks that may share a batch have come by the time it is over.
            "LEGIT_WORKER_MODELS__SIM__PATH": "0.01,0",
        }
    )
    run_python(CREATE, broker, environment)
    worker = start_module_worker("djangoproject", broker=broker, environment=environment)
    return Shop(request.param, worker, folder)


@pytest.mark.parametrize("database", ["default", "other"])
def test_of_many_transactions_across_model_calls_each_stands_or_falls_alone(shop: Shop, database: str) -> None:
    item = f"atomic in {database}"
    assert set(shop.run("writes", item, database)) == {0}, "other tasks ran inside a transaction"
    assert shop.rows(item, database) == {f"{item} {number}": BOTH for number in range(0, TASKS, 2)}


def test_a_transaction_that_a_task_manages_by_hand_is_its_own_too(shop: Shop) -> None:
    assert set(shop.run("writes_by_hand", "by hand")) == {0}, "other tasks ran inside a transaction"
    assert shop.rows("by hand") == {f"by hand {number}": BOTH for number in range(0, TASKS, 2)}


def test_an_inner_block_rolls_back_alone(shop: Shop) -> None:
    items = [f"nested {number}" for number in range(TASKS)]
    answers = shop.worker.answers([shop.worker.send("writes_nested", item) for item in items])
    assert answers == [[0, 2]] * TASKS, "what others did meanwhile, and the rows that the task saw"
    assert shop.rows("nested") == dict.fromkeys(items, BOTH)


def test_hooks_run_once_their_own_transaction_is_committed(shop: Shop) -> None:
    shop.run("tells_when_committed", "hook")
    expected = [*BOTH, "committed after 2"]
    assert shop.rows("hook") == {f"hook {number}": expected for number in range(0, TASKS, 2)}


def test_a_task_without_a_transaction_shares_its_batches(shop: Shop) -> None:
    before = shop.worker.pool()
    items = [f"open {number}" for number in range(TASKS)]
    shop.worker.answers([shop.worker.send("writes_without_transaction", item) for item in items])
    rows = shop.rows("open")
    assert {item: sorted(steps, reverse=True) for item, steps in rows.items()} == dict.fromkeys(items, BOTH)
    if shop.side == "modelpool":
        after = shop.worker.pool()
        assert after["items"] - before["items"] == TASKS
        assert after["batches"] - before["batches"] < TASKS / 2
