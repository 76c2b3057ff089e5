"""Brokers other than the chosen one: RabbitMQ, and a transport that no event loop can wait for."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
from harness import Broker, Sides, poll

Simulated = Callable[[Any], list[float]]


@pytest.fixture
def filesystem(servers: Any) -> Broker:
    """A folder as a broker. Results are elsewhere: a client that looks for them there reads half-written messages."""
    broker: Broker = servers.fresh(broker_url="filesystem://")
    broker.needs_stored_results()
    return broker


def test_batches_form_under_rabbitmq(sides: Sides, rabbitmq: Broker, simulated: Simulated) -> None:
    client = rabbitmq.client()
    items = [f"text {number} " + "word " * (number % 9) for number in range(200)]
    results = [client.send_task("one", [item]) for item in items]
    worker = sides.worker("modelpool", broker=rabbitmq)
    assert worker.answers(results) == [simulated(item) for item in items]
    pool = worker.pool()
    assert pool["items"] == 200
    assert pool["mean_batch"] > 2


def test_a_bad_item_fails_alone_under_rabbitmq(sides: Sides, rabbitmq: Broker) -> None:
    worker = sides.worker("modelpool", broker=rabbitmq)
    results = [worker.send("one", item, alias="picky") for item in ("good", "bad", "fine")]
    good, bad, fine = worker.answers(results)
    assert (good, fine) == ("GOOD", "FINE")
    assert type(bad).__name__ == "InvalidInputError"


def test_a_transport_without_an_event_loop_runs_one_task_after_the_other(
    sides: Sides, filesystem: Broker, simulated: Simulated
) -> None:
    worker = sides.worker("modelpool", broker=filesystem)
    results = [worker.send("one", f"text {number}") for number in range(20)]
    results += [worker.send("two_models", "text"), worker.send("no_model", 1), worker.send("fails_between", "text")]
    answers = worker.answers(results)
    assert answers[:20] == [simulated(f"text {number}") for number in range(20)]
    assert answers[20][0] == simulated("text")
    assert answers[21] == 2
    assert isinstance(answers[22], RuntimeError)


def test_tasks_that_are_due_later_are_run_without_an_event_loop_too(
    sides: Sides, filesystem: Broker, simulated: Simulated
) -> None:
    """A thread of Celery's starts them, beside the worker's own."""
    worker = sides.worker("modelpool", broker=filesystem)
    due = [worker.client.send_task("one", [f"due {number}"], countdown=0.5) for number in range(10)]
    now = [worker.send("one", f"now {number}") for number in range(20)]
    assert worker.answers(now) == [simulated(f"now {number}") for number in range(20)]
    assert worker.answers(due) == [simulated(f"due {number}") for number in range(10)]


def test_one_call_of_many_items_is_a_batch_without_an_event_loop_too(
    sides: Sides, filesystem: Broker, simulated: Simulated
) -> None:
    worker = sides.worker("modelpool", broker=filesystem)
    outputs = [simulated(f"item {number}") for number in range(1000)]
    assert worker.ask("many", 1000) == hashlib.sha256(json.dumps(outputs).encode()).hexdigest()
    assert worker.ask("one", "a text", alias="reports")["batch"] == 1


@pytest.mark.parametrize(
    ("side", "signals"),
    [
        pytest.param("stock", [signal.SIGTERM], id="stock warm"),
        pytest.param("modelpool", [signal.SIGTERM], id="modelpool warm"),
        pytest.param("modelpool", [signal.SIGTERM, signal.SIGQUIT], id="modelpool cold"),
    ],
)
def test_a_worker_without_an_event_loop_leaves_the_rest_to_the_next(
    sides: Sides, filesystem: Broker, side: str, signals: list[signal.Signals]
) -> None:
    first = sides.worker(side, broker=filesystem)
    sent = [first.send("one", f"text {number}", alias="slow") for number in range(20)]
    poll(lambda: any(result.ready() for result in sent), "the first answer")
    for number in signals:
        first.signal(number)
        first.wait_for_log("Warm shutdown")
    assert first.wait() == 0
    assert not all(result.ready() for result in sent)
    assert sides.worker(side, broker=filesystem).answers(sent) == [f"TEXT {number}" for number in range(20)]
