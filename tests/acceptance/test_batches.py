"""Tasks that wait together are computed together, and `celery inspect stats` says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from commands import celery
from harness import Sides, Worker, poll

Simulated = Callable[[Any], list[float]]

#: What the pool's part of `inspect stats` has under ModelPool, besides what every pool has.
KEYS = {"window", "in_flight", "parked", "batches", "items", "mean_batch", "waste", "models"}


def test_tasks_that_were_queued_before_the_start_are_computed_as_batches(
    sides: Sides, broker: Any, simulated: Simulated
) -> None:
    client = broker.client()
    items = [f"text {number} " + "word " * (number % 9) for number in range(200)]
    results = [client.send_task("one", [item]) for item in items]
    worker = sides.worker("modelpool", broker=broker)
    assert worker.answers(results) == [simulated(item) for item in items]
    pool = worker.pool()
    assert pool["items"] == 200
    assert pool["batches"] < 100
    assert pool["mean_batch"] > 2


def test_inspect_stats_describes_the_pool_and_each_model(model_pool: Worker) -> None:
    model_pool.answers([model_pool.send("one", f"text {number}") for number in range(50)])
    pool = model_pool.pool()
    assert pool.keys() >= KEYS
    assert pool["in_flight"] == 0
    assert pool["parked"] == 0
    assert 0 <= pool["waste"] < 1
    sim = pool["models"]["sim"]
    assert sim["kind"] == "simulated"
    assert sim["state"] == "resident"
    assert sim["items"] >= 50
    assert pool["models"]["unloadable"]["state"] == "unloaded"
    assert pool["items"] == sum(model.get("items", 0) for model in pool["models"].values())


def test_parked_tasks_show_in_the_statistics(model_pool: Worker) -> None:
    results = [model_pool.send("one", f"text {number}", alias="slow") for number in range(100)]
    pool = poll(lambda: (stats := model_pool.pool())["parked"] > 1 and stats, "tasks that wait for a model")
    assert pool["in_flight"] >= pool["parked"]
    assert pool["models"]["slow"]["state"] in ("loading", "resident")
    model_pool.settle(results)


@pytest.mark.parametrize("late", ["1", "0"], ids=["late acks", "early acks"])
def test_the_window_bounds_the_tasks_in_flight(sides: Sides, broker: Any, late: str) -> None:
    """Early acks have the broker send more: those wait until there is room."""
    client = broker.client()
    results = [client.send_task("one", [f"text {number}"], {"alias": "even"}) for number in range(60)]
    worker = sides.worker("modelpool", broker=broker, LEGIT_WORKER_WINDOW="8", PROJECT_ACKS_LATE=late)
    seen = []

    def watch() -> bool:
        seen.append(worker.pool())
        return all(result.ready() for result in results)

    poll(watch, "all answers")
    assert {pool["window"] for pool in seen} == {8}
    assert 1 < max(pool["in_flight"] for pool in seen) <= 8


def test_the_model_is_loaded_by_the_loader_thread_and_computes_in_the_main_thread(model_pool: Worker) -> None:
    reports = model_pool.answers([model_pool.send("one", f"text {n}", alias="reports") for n in range(30)])
    assert {report["thread"] for report in reports} == {"MainThread"}
    assert all(report["loaded_by"].startswith("legit-loader") for report in reports)


def test_a_delay_that_the_user_allows_is_used_to_gather_tasks(sides: Sides, broker: Any) -> None:
    """Fetching a hundred tasks takes a small part of a second; the worker was told to wait for one."""
    worker = sides.worker("modelpool", broker=broker, LEGIT_WORKER_MAX_QUEUE_DELAY="1")
    worker.ask("many", 500, alias="counting")  # from which the worker learns that the model takes large batches
    worker.settle([worker.send("one", f"text {number}", alias="counting") for number in range(100)])
    assert "computes 100 items" in worker.log


def test_a_models_batches_stay_below_the_time_that_the_user_set(sides: Sides, broker: Any) -> None:
    """Each item takes 20 ms: 50 ms hold two, however many wait, once the first few have shown how long they take."""
    client = broker.client()
    results = [client.send_task("one", [f"text {number}"], {"alias": "even"}) for number in range(60)]
    worker = sides.worker("modelpool", broker=broker, LEGIT_WORKER_MAX_BATCH_SECONDS="0.05")
    worker.settle(results)
    sizes = [int(size) for size in re.findall(r"computes (\d+) items", worker.log)]
    assert sizes[0] <= 8
    assert max(sizes[1:]) == 2


def test_a_model_with_a_slow_launch_gets_what_the_broker_has(sides: Sides, broker: Any) -> None:
    """From thirty tasks it learns that a batch takes a second whatever its size; the next eighty are few batches."""
    worker = sides.worker("modelpool", broker=broker)
    batches = []
    for tasks in (30, 80):
        worker.settle([worker.send("one", f"text {number}", alias="launching") for number in range(tasks)])
        batches.append([int(size) for size in re.findall(r"computes (\d+) items", worker.log)])
    learned, all_of_them = batches
    assert sum(all_of_them) == 110
    assert len(all_of_them) - len(learned) <= 3


def test_trial_batches_do_not_hold_up_a_slow_models_first_task(sides: Sides) -> None:
    """All of them would take eight minutes; the first one alone takes five seconds."""
    worker = sides.worker("modelpool", LEGIT_WORKER_MODELS__OTHER__PATH="0,0.16")
    worker.ask("one", "text", alias="other")
    assert worker.log.count("model 'other' is slow: 6 of 7 trial batches were left out") == 1


def test_celery_legit_status_shows_the_same_as_inspect(model_pool: Worker) -> None:
    model_pool.ask("one", "text")
    finished = celery("project", "legit", "status", "--json", "--timeout=2", broker=model_pool.broker)
    assert finished.returncode == 0, finished.stderr
    shown = json.loads(finished.stdout)[model_pool.name]
    assert shown["models"] == model_pool.pool()["models"]
