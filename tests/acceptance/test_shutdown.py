"""No task is lost: when the worker is killed, when it is told to stop, when another runs beside it."""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from harness import GREEDY, SIDES, Broker, Sides, Worker, poll

#: Tasks of a fiftieth of a second each: two seconds in all.
TASKS = 100


def slow_tasks(broker: Broker, count: int = TASKS) -> list[Any]:
    """Tasks that wait in the queue, with the answers that they will have."""
    client = broker.client()
    return [client.send_task("one", [f"text {number}"], {"alias": "slow"}) for number in range(count)]


def expected(count: int = TASKS) -> list[str]:
    return [f"TEXT {number}" for number in range(count)]


def answered(results: list[Any]) -> int:
    return sum(result.ready() for result in results)


def succeeded(*workers: Worker) -> list[str]:
    """The ids of all tasks that these workers finished, one for each time."""
    return [task for worker in workers for task in re.findall(r"Task one\[(\S+)\] succeeded", worker.log)]


def test_a_worker_that_is_killed_in_the_middle_of_a_batch_loses_no_task(sides: Sides, servers: Any) -> None:
    check_kill(sides, servers.fresh(redelivery_seconds=1))


def test_a_worker_that_is_killed_loses_no_task_under_rabbitmq(sides: Sides, rabbitmq: Broker) -> None:
    check_kill(sides, rabbitmq)


def check_kill(sides: Sides, broker: Broker) -> None:
    """A hundred tasks are in flight, having gathered while their model was loading, and the process is gone."""
    client = broker.client()
    results = [client.send_task("one", [f"text {number}"], {"alias": "slow_to_load"}) for number in range(TASKS)]
    first = sides.worker("modelpool", broker=broker, **GREEDY)
    first.wait_for_log("computes")
    first.kill()
    assert len(first.received) == TASKS
    assert answered(results) < TASKS
    # The same alias, and no half a second for each batch: on RabbitMQ, each of them is alone in one.
    second = sides.worker("modelpool", broker=broker, LEGIT_WORKER_MODELS__SLOW_TO_LOAD__KIND="custom_models:Upper")
    assert second.answers(results) == expected()


@pytest.mark.parametrize("side", SIDES)
def test_a_warm_shutdown_finishes_what_runs_and_leaves_the_rest_to_the_next_worker(
    sides: Sides, broker: Broker, side: str
) -> None:
    results = slow_tasks(broker)
    first = sides.worker(side, broker=broker, LEGIT_WORKER_WINDOW="40")
    poll(lambda: answered(results) > 5, "the first answers")
    assert first.stop() == 0
    assert answered(results) < TASKS, "all were answered before the shutdown: this shows nothing"
    assert "Traceback" not in first.log
    second = sides.worker(side, broker=broker)
    assert second.answers(results) == expected()
    assert sorted(succeeded(first, second)) == sorted(result.id for result in results), "each ran exactly once"


def test_a_warm_shutdown_lets_parked_tasks_finish(sides: Sides, broker: Broker) -> None:
    results = slow_tasks(broker, 30)
    worker = sides.worker("modelpool", broker=broker)
    poll(lambda: len(worker.received) == 30, "all tasks to come")
    worker.wait_for_log(" succeeded in ")
    assert worker.stop() == 0
    assert [result.result for result in results] == expected(30)


def test_an_idle_worker_stops_at_once(sides: Sides) -> None:
    worker = sides.worker("modelpool")
    worker.ask("one", "text")
    assert worker.stop(seconds=10) == 0
    assert "Traceback" not in worker.log


@pytest.mark.parametrize(
    ("task", "moment"),
    [
        pytest.param("one", "computes ", id="in a batch"),
        pytest.param("dawdles", "computes something itself", id="in a task's own code"),
    ],
)
def test_a_cold_shutdown_gives_the_tasks_back(sides: Sides, servers: Any, task: str, moment: str) -> None:
    """Celery stops the pool from within the signal's handler, whatever the main thread was doing."""
    broker = servers.fresh(redelivery_seconds=1)
    client = broker.client()
    results = [client.send_task(task, [f"text {number}"], {"alias": "slow_to_load"}) for number in range(20)]
    first = sides.worker("modelpool", broker=broker)
    first.wait_for_log(moment)
    first.signal(signal.SIGQUIT)
    first.wait(seconds=10)
    second = sides.worker("modelpool", broker=broker)
    assert second.answers(results) == expected(20)


def test_two_workers_on_one_queue_answer_every_task_once(sides: Sides, broker: Broker) -> None:
    workers = [sides.worker("modelpool", broker=broker, LEGIT_WORKER_WINDOW="16") for _ in range(2)]
    results = slow_tasks(broker)
    assert workers[0].answers(results) == expected()
    poll(lambda: len(succeeded(*workers)) >= TASKS, "both logs")
    assert sorted(succeeded(*workers)) == sorted(result.id for result in results)
    assert all(succeeded(worker) for worker in workers), "one worker did it all"


def test_a_parked_task_can_be_revoked_and_the_others_go_on(sides: Sides, broker: Broker) -> None:
    results = slow_tasks(broker)
    worker = sides.worker("modelpool", broker=broker)
    last = results[-1]
    poll(lambda: last.id in worker.received, "the last task to start")
    worker.client.control.revoke(last.id, terminate=True, destination=[worker.name])
    assert worker.answers(results[:-1]) == expected(TASKS - 1)
    with pytest.raises(TaskRevokedError):
        worker.answer(last)


def test_a_lost_connection_to_the_broker_loses_no_task(sides: Sides, servers: Any) -> None:
    """Celery connects again, with a new event loop's readers; tasks that were parked meanwhile go on."""
    broker = servers.fresh(redelivery_seconds=5)
    if not broker.url.startswith("redis"):
        pytest.skip("connections are cut by Redis's own command")
    worker = sides.worker("modelpool", broker=broker)
    results = slow_tasks(broker)
    poll(lambda: answered(results) > 5, "the first answers")
    cut_connections(broker)
    worker.wait_for_log("Connection to broker lost")
    later = [worker.send("one", "text") for _ in range(5)]
    assert worker.answers(results) == expected()
    worker.settle(later)
    assert all(result.successful() for result in later)


def cut_connections(broker: Broker) -> None:
    """All of this database's clients but this one, at once."""
    import redis

    with redis.Redis.from_url(broker.url) as connection:
        database = broker.url.rpartition("/")[2]
        for client in connection.client_list():
            if client["db"] == database and client["id"] != str(connection.client_id()):
                connection.client_kill_filter(_id=client["id"])
