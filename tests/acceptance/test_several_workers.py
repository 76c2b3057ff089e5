"""Three workers, models split by queue: one is killed, one drained, one replaced, under load. Nothing is lost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import pytest
from harness import Broker, Sides, StartWorker, Worker, poll

#: Seconds between two pairs of tasks.
PACE = 0.02

#: Tasks that a worker must end before the next thing happens.
SOME = 20


class Load:
    """A client that sends tasks to two queues, from a thread of its own, until `stop`."""

    def __init__(self, broker: Broker) -> None:
        self._client = broker.client()
        self._is_over = threading.Event()
        self.queues = {model: f"{broker.queue}.{model}" for model in ("sim", "other")}
        #: The text of each task, and its result.
        self.sent: list[tuple[str, Any]] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(PACE):
            for model, queue in self.queues.items():
                text = f"{model} {len(self.sent)}"
                self.sent.append((text, self._client.send_task("one", [text], {"alias": model}, queue=queue)))

    def stop(self) -> None:
        """Send no more."""
        self._is_over.set()
        self._thread.join()


@pytest.fixture(params=["redis", "rabbitmq"])
def one_broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """Each kind of broker, with results where anybody finds them."""
    broker: Broker = request.getfixturevalue("rabbitmq" if request.param == "rabbitmq" else "broker")
    broker.needs_stored_results()
    yield broker
    with contextlib.suppress(Exception), kombu.Connection(broker.url) as connection:
        for model in ("sim", "other"):
            connection.default_channel.queue_delete(f"{broker.queue}.{model}")


@pytest.fixture
def load(one_broker: Broker) -> Iterator[Load]:
    """It begins at once: the first tasks are there before a worker is."""
    load = Load(one_broker)
    yield load
    load.stop()


def test_work_moves_and_no_task_fails_while_workers_are_killed_drained_and_replaced(
    start_worker: StartWorker, one_broker: Broker, load: Load, simulated: Callable[[Any], list[float]]
) -> None:
    def start(*models: str) -> Worker:
        queues = ",".join(load.queues[model] for model in models)
        return Sides(start_worker).worker("modelpool", f"--queues={queues}", broker=one_broker)

    def works(*workers: Worker) -> None:
        """Each of them ends some more."""
        for worker in workers:
            target = succeeded(worker) + SOME
            poll(lambda one=worker, least=target: succeeded(one) >= least, f"{worker.name} to work")

    for_sim, for_other, for_both = start("sim"), start("other"), start("sim", "other")
    works(for_sim, for_other, for_both)
    for_other.kill()
    works(for_sim, for_both)
    assert for_sim.stop() == 0
    works(for_both)
    replaces = start("sim", "other")
    works(replaces, for_both)
    assert for_both.stop() == 0
    works(replaces)
    load.stop()
    answers = replaces.answers([result for _, result in load.sent])
    assert answers == [simulated(text) for text, _ in load.sent]


def succeeded(worker: Worker) -> int:
    """Tasks that this worker has ended."""
    return worker.log.count(" succeeded in ")
