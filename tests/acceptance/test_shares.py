"""Workers on one queue: each gets its part, whatever the window says and whenever it starts."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import kombu
from harness import Broker, Client, Sides, StartWorker, Worker, poll

#: Tasks of a tenth of a second each.
TASKS = 200

#: The part of the tasks that each of two workers must get, once both have some. A half is ideal; the first one starts
#: with some in hand.
PART = 0.35


def done(worker: Worker) -> int:
    """Tasks that this worker has finished."""
    return worker.log.count(" succeeded in ")


def join_late(sides: Sides, broker: Broker, results: Callable[[Client], list[Any]], **settings: str) -> None:
    """A second worker, which has started by then, joins when the first has done a twentieth: each gets its part.

    A machine that is busy may take seconds until the second hears that it is to join.
    """
    first = sides.worker("modelpool", broker=broker, **settings)
    second = sides.worker("modelpool", f"--queues={broker.queue}-idle", broker=broker, **settings)
    sent = results(broker.client())
    poll(lambda: done(first) > len(sent) // 20, "the first tasks")
    second.wait_until_it_hears()
    second.client.control.add_consumer(broker.queue, destination=[second.name])
    poll(lambda: second.received, "the second worker's first task")
    before = done(first)
    first.settle(sent)
    poll(lambda: done(first) + done(second) == len(sent), "the last lines of the logs")
    assert min(done(first) - before, done(second)) > (len(sent) - before) * PART, (before, done(first), done(second))


def heavy(client: Client) -> list[Any]:
    return [client.send_task("one", ["text"], {"alias": "heavy"}) for _ in range(TASKS)]


def test_the_second_worker_gets_its_part(sides: Sides, broker: Broker) -> None:
    join_late(sides, broker, heavy)


def test_the_second_worker_gets_its_part_under_rabbitmq(start_worker: StartWorker, rabbitmq: Broker) -> None:
    join_late(Sides(start_worker), rabbitmq, heavy)


def test_the_second_worker_gets_its_part_of_a_quorum_queue(start_worker: StartWorker, rabbitmq: Broker) -> None:
    """Whose consumers have a prefetch count of their own, for good."""
    join_late(Sides(start_worker), dataclasses.replace(rabbitmq, queue_type="quorum"), heavy)


def test_what_is_held_follows_what_tasks_take(sides: Sides, broker: Broker) -> None:
    """Two seconds of work are 20 of these tasks, and any number of those."""
    worker = sides.worker("modelpool", broker=broker, LEGIT_WORKER_MAX_HELD_SECONDS="2")
    assert worker.stats()["prefetch_count"] == 16
    heavy = [worker.send("one", "text", alias="heavy") for _ in range(100)]
    poll(lambda: done(worker) > 30, "some tasks")
    assert worker.pool()["in_flight"] <= 40
    worker.settle(heavy)
    for _ in range(5):  # results by message come in a backlog of a thousand at most
        worker.settle([worker.send("no_model", number) for number in range(200)])
    poll(lambda: worker.stats()["prefetch_count"] > 100, "a wide window")


def test_no_more_is_held_than_fits_into_the_bytes(sides: Sides, broker: Broker) -> None:
    """Messages of half a MiB, and room for twelve of them."""
    worker = sides.worker("modelpool", broker=broker, LEGIT_WORKER_MAX_HELD_BYTES="6MiB")
    worker.settle([worker.send("one", "text", alias="heavy")])
    large = [worker.send("one", "x" * 500_000, alias="heavy") for _ in range(40)]
    poll(lambda: done(worker) > 3, "some tasks")
    assert 1 < worker.stats()["prefetch_count"] < 20
    worker.settle(large)
    worker.settle([worker.send("no_model", number) for number in range(100)])
    poll(lambda: worker.stats()["prefetch_count"] > 20, "a wide window")


def test_tasks_that_run_their_own_code_for_long_are_left_to_others_too(sides: Sides, broker: Broker) -> None:
    def sleep(client: Client) -> list[Any]:
        return [client.send_task("sleeps", [0.1]) for _ in range(TASKS // 2)]

    join_late(sides, broker, sleep, LEGIT_WORKER_MAX_HELD_SECONDS="1")


def test_tasks_that_are_acked_early_are_left_to_others_too(sides: Sides, broker: Broker) -> None:
    """Those that run are acked, and those that do not are still the broker's."""
    worker = sides.worker("modelpool", broker=broker, LEGIT_WORKER_MAX_HELD_SECONDS="1", PROJECT_ACKS_LATE="0")
    results = [worker.send("one", "text", alias="heavy") for _ in range(100)]
    held = []

    def watch() -> bool:
        held.append(len(worker.received) - done(worker))
        return all(result.ready() for result in results)

    poll(watch, "all answers")
    assert max(held[len(held) // 2 :]) < 30, held


def test_a_stopping_worker_takes_no_more_from_a_quorum_queue(start_worker: StartWorker, rabbitmq: Broker) -> None:
    broker = dataclasses.replace(rabbitmq, queue_type="quorum")
    worker = Sides(start_worker).worker("modelpool", broker=broker, LEGIT_WORKER_MAX_HELD_SECONDS="1")
    client = broker.client()
    last = [worker.send("sleeps", 0.05) for _ in range(100)]
    poll(lambda: done(worker) > 20, "the first tasks")
    last.append(worker.send("one", "text", alias="slow_to_load"))  # which keeps it for two seconds
    poll(lambda: worker.pool()["parked"], "it to wait for its model")
    worker.signal(signal.SIGTERM)
    worker.wait_for_log("still finishing")
    later = [client.send_task("no_model", [number]) for number in range(200)]
    assert worker.wait() == 0
    assert not worker.received & {result.id for result in later}


def test_a_queue_that_goes_with_its_last_consumer_stays_beside_a_quorum_queue(
    start_worker: StartWorker, rabbitmq: Broker
) -> None:
    """A `Broadcast` is one. The quorum queue's consumers are replaced, so that they have another prefetch count."""
    worker = Sides(start_worker).worker("modelpool", broker=dataclasses.replace(rabbitmq, queue_type="quorum"))
    fleeting = f"{rabbitmq.queue}-fleeting"
    worker.wait_until_it_hears()
    worker.client.control.add_consumer(
        fleeting, destination=[worker.name], options={"auto_delete": True, "durable": False}
    )
    before = worker.stats()["prefetch_count"]
    worker.settle([worker.send("no_model", number) for number in range(200)])
    poll(lambda: worker.stats()["prefetch_count"] != before, "another prefetch count")
    poll(lambda: len(worker.inspect().active_queues()[worker.name]) == 2, "both queues")
    worker.settle(
        [worker.client.send_task("no_model", [1], queue=kombu.Queue(fleeting, durable=False, auto_delete=True))]
    )
    worker.settle([worker.send("no_model", 1)])


def test_tasks_for_a_resident_model_do_not_wait_for_a_window_of_others_to_load(sides: Sides, broker: Broker) -> None:
    cold = {"LEGIT_WORKER_MODELS__COLD__KIND": "simulated", "LEGIT_WORKER_MODELS__COLD__PATH": "0,0,0,10"}
    # A window of 1,024 would be more results than a client of rpc:// keeps for later.
    worker = sides.worker("modelpool", broker=broker, LEGIT_WORKER_WINDOW="128", **cold)
    worker.settle([worker.send("one", "text", alias="sim")])
    waiting = [worker.send("one", f"text {number}", alias="cold") for number in range(128)]
    worker.settle([worker.send("one", f"text {number}", alias="sim") for number in range(50)])
    assert "model 'cold' loaded" not in worker.log
    assert worker.pool()["in_flight"] == len(waiting)
    worker.settle(waiting)


def short_among_slow(sides: Sides, broker: Broker) -> None:
    """A result comes before most of the slow tasks behind it, though their messages were there with its own."""
    worker = sides.worker("modelpool", broker=broker)
    worker.settle([worker.send("one", "text", alias="sim")])
    before = worker.send("sleeps", 2)
    poll(lambda: before.id in worker.received, "the first task")  # the others come while it runs
    quick = [worker.send("sleeps", 0) for _ in range(7)]
    short = worker.send("one", "short", alias="sim")
    slow = [worker.send("sleeps", 0.5) for _ in range(12)]
    worker.settle([*quick, short, *slow])
    ends = [line for line in worker.log.splitlines() if " succeeded in " in line]
    place = next(number for number, line in enumerate(ends) if short.id in line)
    assert sum(any(one.id in line for one in slow) for line in ends[:place]) <= 4


def test_a_result_does_not_wait_until_a_whole_group_of_slow_tasks_has_begun(sides: Sides, broker: Broker) -> None:
    """Redis gives the group at once: 1 message, 2, 4, 8. The eighth is the first of these."""
    short_among_slow(sides, broker)


def test_a_result_does_not_wait_until_all_that_rabbitmq_has_sent_has_begun(
    start_worker: StartWorker, rabbitmq: Broker
) -> None:
    short_among_slow(Sides(start_worker), rabbitmq)


def test_rabbitmq_is_read_after_a_long_task_with_no_end(start_worker: StartWorker, rabbitmq: Broker) -> None:
    worker = Sides(start_worker).worker("modelpool", broker=rabbitmq)
    for number in range(3):
        ignored = worker.send("ignores", 0.5)
        worker.wait_for_log(f"{ignored.id}] ignored")
        assert worker.ask("no_model", number) == number + 1
