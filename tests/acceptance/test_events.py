"""Events: what a worker that is started with `-E` tells those who watch it, and what Flower makes of it.

Each test that takes `worker` runs under stock solo and under ModelPool.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery.events import EventReceiver
from celery.result import AsyncResult
from flowers import Flower, running_flower
from harness import INSPECT_SECONDS, LATE, SIDES, Broker, Sides, StartWorker, Worker, poll

#: Events are on from the start.
OPTIONS = ("-E",)

#: What Celery documents for each event of a task, besides `uuid`, `hostname`, `timestamp`, `clock` and the like.
FIELDS = {
    "task-received": {"name", "args", "kwargs", "retries", "eta", "expires", "root_id", "parent_id"},
    "task-started": set(),
    "task-succeeded": {"result", "runtime"},
    "task-failed": {"exception", "traceback"},
    "task-retried": {"exception", "traceback"},
    "task-revoked": {"terminated", "signum", "expired"},
}

#: What every event has.
COMMON = {"uuid", "hostname", "pid", "timestamp", "utcoffset", "clock", "local_received"}


class Watcher:
    """Receives events in a thread of its own, as a monitor does."""

    def __init__(self, broker: Broker) -> None:
        self.events: list[dict[str, Any]] = []
        self._client = broker.client()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watcher]:
        """For as long as the block runs."""
        with self._client.connection_for_read() as connection:
            receiver = EventReceiver(connection, handlers={"*": self.events.append}, app=self._client)
            thread = threading.Thread(target=lambda: receiver.capture(limit=None, timeout=None), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                receiver.should_stop = True
                thread.join()

    def of(self, result: AsyncResult[Any]) -> list[dict[str, Any]]:
        """This task's events, in their order."""
        return [event for event in list(self.events) if event.get("uuid") == result.id]

    def types_of(self, result: AsyncResult[Any]) -> list[str]:
        """What happened to this task."""
        return [event["type"] for event in self.of(result)]

    def beats(self, worker: Worker) -> list[dict[str, Any]]:
        """Its regular ones: what a new monitor asks for counts nothing, and RabbitMQ brings other workers', too."""
        beats = self.workers("worker-heartbeat")
        return [event for event in beats if "processed" in event and event["hostname"] == worker.name]

    def workers(self, kind: str) -> list[dict[str, Any]]:
        """The events of a worker of this kind."""
        return [event for event in list(self.events) if event["type"] == kind]


@pytest.fixture(scope="module", params=SIDES)
def worker(request: pytest.FixtureRequest, start_module_worker: StartWorker) -> Worker:
    """One worker a side that this file's tests share."""
    return Sides(start_module_worker, "controlled", OPTIONS).worker(request.param)


@pytest.fixture(scope="module")
def watcher(worker: Worker) -> Iterator[Watcher]:
    """Sees what the worker tells."""
    with Watcher(worker.broker).watching() as watcher:
        # A monitor hears what is sent once it listens; a heartbeat shows that it does.
        poll(lambda: watcher.workers("worker-heartbeat"), "a heartbeat")
        yield watcher


@pytest.fixture(scope="module")
def flower(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """A Flower that watches the worker."""
    with running_flower(worker.broker, tmp_path_factory.mktemp("flower")) as flower:
        poll(lambda: flower.get("api/workers", status=1).get(worker.name), "Flower to see the worker")
        yield flower


ATTEMPT = ["task-received", "task-started"]


@pytest.mark.parametrize(
    ("task", "arguments", "expected"),
    [
        pytest.param("no_model", [1], [*ATTEMPT, "task-succeeded"], id="no model"),
        pytest.param("two_models", ["text"], [*ATTEMPT, "task-succeeded"], id="parks twice"),
        pytest.param("fails_between", ["text"], [*ATTEMPT, "task-failed"], id="fails after it parked"),
        pytest.param("one", ["bad", "picky"], [*ATTEMPT, "task-failed"], id="a bad item"),
        pytest.param(
            "retries", ["text"], [*ATTEMPT, "task-retried", *ATTEMPT, "task-retried", *ATTEMPT, "task-succeeded"]
        ),
    ],
)
def test_each_step_of_a_task_is_told_once_with_its_fields(
    worker: Worker, watcher: Watcher, task: str, arguments: list[Any], expected: list[str]
) -> None:
    result = worker.send(task, *arguments)
    poll(lambda: watcher.types_of(result)[-1:] == expected[-1:], f"{expected[-1]} of {task}")
    events = watcher.of(result)
    assert [event["type"] for event in events] == expected
    for event in events:
        assert event.keys() >= COMMON | FIELDS[event["type"]], event["type"]
        assert (event["hostname"], event["pid"]) == (worker.name, worker.pid)
    assert [event["clock"] for event in events] == sorted(event["clock"] for event in events)


def test_a_tasks_wait_is_told_beside_its_runtime(sides: Sides, broker: Broker) -> None:
    """Tasks of a fiftieth of a second each wait for their turn, and all but the first ones longer than they run."""
    worker = Sides(sides.start, "controlled", OPTIONS).worker("modelpool", broker=broker)
    with Watcher(broker).watching() as watcher:
        poll(lambda: watcher.workers("worker-heartbeat"), "a heartbeat")
        results = [worker.send("one", f"text {number}", alias="slow") for number in range(60)]
        failed = worker.send("fails_between", "text")
        poll(lambda: watcher.types_of(results[-1])[-1:] == ["task-succeeded"], "the last one's end")
        poll(lambda: watcher.types_of(failed)[-1:] == ["task-failed"], "the failure")
        ends = [watcher.of(result)[-1] for result in results]
        assert max(end["waited"] for end in ends) > max(end["runtime"] for end in ends) > 0
        assert watcher.of(failed)[-1]["waited"] >= 0


def test_a_task_that_rejects_its_message_is_told_as_such(worker: Worker, watcher: Watcher) -> None:
    result = worker.send("rejects", "text")
    poll(lambda: watcher.types_of(result)[-1:] == ["task-rejected"], "task-rejected")
    assert watcher.types_of(result)[:2] == ATTEMPT  # from Celery 5.7 on, a failure is told in between
    assert watcher.of(result)[-1]["requeue"] is False


def test_tasks_that_overlap_are_told_apart(worker: Worker, watcher: Watcher) -> None:
    results = [worker.send("one", f"text {number}", alias="slow") for number in range(30)]
    worker.settle(results)
    poll(lambda: watcher.types_of(results[-1])[-1:] == ["task-succeeded"], "the last one's end")
    for number, result in enumerate(results):
        received, started, succeeded = watcher.of(result)
        assert f"text {number}" in received["args"]
        assert (started["type"], succeeded["type"]) == ("task-started", "task-succeeded")
        assert succeeded["result"] == f"'TEXT {number}'"
        assert succeeded["runtime"] > 0.01
        own_and_wait = succeeded["runtime"] + succeeded.get("waited", 0)  # stock solo's tasks don't wait
        assert succeeded["timestamp"] - started["timestamp"] == pytest.approx(own_and_wait, abs=0.2)


def test_a_task_that_expired_and_one_that_was_revoked_are_told_as_such(worker: Worker, watcher: Watcher) -> None:
    expired = worker.client.send_task("no_model", [1], expires=-1)
    revoked = worker.client.send_task("no_model", [1], countdown=4)
    poll(lambda: watcher.types_of(revoked) == ["task-received"], "the one that is due later")
    worker.client.control.revoke(revoked.id, destination=[worker.name])
    poll(lambda: watcher.types_of(revoked) == ["task-received", "task-revoked"], "its end")
    assert watcher.types_of(expired) == ["task-revoked"]
    (end,) = watcher.of(expired)
    assert (end["expired"], end["terminated"]) == (True, False)
    assert (watcher.of(revoked)[-1]["expired"], watcher.of(revoked)[-1]["terminated"]) == (False, False)


def test_heartbeats_count_what_was_done_and_what_runs(worker: Worker, watcher: Watcher) -> None:
    before = sum(worker.stats()["total"].values())
    worker.settle([worker.send("one", f"text {number}") for number in range(20)])
    beat = poll(
        # A task counts from its start: a heartbeat may come while some of them are still active.
        lambda: [beat for beat in watcher.beats(worker) if beat["processed"] >= before + 20 and not beat["active"]],
        "a heartbeat that counts them, with none active any more",
    )[0]
    assert beat["processed"] == before + 20
    assert (beat["hostname"], beat["sw_ident"], beat["pid"]) == (worker.name, "py-celery", worker.pid)
    assert len(beat["loadavg"]) == 3


@pytest.mark.parametrize("side", SIDES)
def test_events_are_switched_on_and_off_by_remote_control(start_worker: StartWorker, broker: Broker, side: str) -> None:
    worker = Sides(start_worker, "controlled", OPTIONS[1:]).worker(side, broker=broker)

    def switch(command: str) -> None:
        worker.wait_until_it_hears()
        replies = worker.client.control.broadcast(
            command, destination=[worker.name], reply=True, timeout=INSPECT_SECONDS
        )
        assert "ok" in replies[0][worker.name]

    with Watcher(broker).watching() as watcher:
        poll(lambda: watcher.workers("worker-heartbeat"), "a heartbeat")
        before = worker.send("one", "text")
        worker.settle([before])
        switch("enable_events")
        told = worker.send("one", "text")
        worker.settle([told])
        switch("disable_events")
        after = worker.send("one", "text")
        worker.settle([after])
        switch("enable_events")
        last = worker.send("one", "text")
        poll(lambda: watcher.types_of(last)[-1:] == ["task-succeeded"], "the last one's end")
    assert [watcher.types_of(result) for result in (before, after)] == [[], []]
    assert watcher.types_of(told) == [*ATTEMPT, "task-succeeded"]


def test_a_worker_says_that_it_came_and_that_it_went(
    request: pytest.FixtureRequest, worker: Worker, watcher: Watcher, start_worker: StartWorker
) -> None:
    side = request.node.callspec.params["worker"]
    other = Sides(start_worker, "controlled", OPTIONS).worker(side, broker=worker.broker)
    for kind in ("worker-online", "worker-offline"):
        poll(lambda kind=kind: other.name in {event["hostname"] for event in watcher.workers(kind)}, kind)  # type: ignore[misc]
        if kind == "worker-online":
            assert other.stop() == 0


def test_a_parked_task_that_is_terminated_is_told_as_such(start_worker: StartWorker, broker: Broker) -> None:
    worker = Sides(start_worker, "controlled", OPTIONS).worker("modelpool", broker=broker, **LATE)
    with Watcher(broker).watching() as watcher:
        poll(lambda: watcher.workers("worker-heartbeat"), "a heartbeat")
        result = worker.send("one", "text", alias="late")
        poll(lambda: watcher.types_of(result) == ATTEMPT, "its start")
        beat = poll(lambda: [beat for beat in watcher.beats(worker) if beat["active"]], "an active task counted")[0]
        assert beat["active"] == 1
        worker.client.control.revoke(result.id, terminate=True, signal="SIGKILL", destination=[worker.name])
        poll(lambda: watcher.types_of(result) == [*ATTEMPT, "task-revoked"], "its end")
        end = watcher.of(result)[-1]
        assert (end["terminated"], end["signum"], end["expired"]) == (True, 9, False)
        worker.settle([worker.send("one", "text")])
        assert watcher.types_of(result) == [*ATTEMPT, "task-revoked"]


# Flower.


def test_flower_shows_the_worker_its_queues_and_its_statistics(worker: Worker, flower: Flower) -> None:
    worker.ask("no_model", 1)
    shown = flower.get("api/workers", refresh=1, workername=worker.name)[worker.name]
    assert [queue["name"] for queue in shown["active_queues"]] == [worker.broker.queue]
    assert {"one", "no_model"} <= set(shown["registered"])
    assert shown["stats"]["pid"] == worker.pid
    assert shown["stats"]["total"]["no_model"] >= 1
    assert shown["stats"]["pool"]["max-concurrency"] >= 1
    assert shown["conf"]["task_default_queue"] == worker.broker.queue
    assert (shown["active"], shown["reserved"], shown["scheduled"]) == ([], [], [])
    assert "no_model" in flower.get("api/task/types")["task-types"]
    assert flower.text("worker/" + worker.name)


def test_flower_shows_tasks_with_state_runtime_and_worker(worker: Worker, flower: Flower) -> None:
    sent = {
        "SUCCESS": worker.send("one", "text", alias="slow"),
        "FAILURE": worker.send("fails_between", "text"),
        "REVOKED": worker.client.send_task("one", ["text"], expires=-1),
    }
    retried = worker.send("retries", "text")
    worker.settle([*sent.values(), retried])

    def shown() -> dict[str, Any]:
        tasks = flower.get("api/tasks")
        states = {state: tasks.get(result.id, {}).get("state") for state, result in sent.items()}
        done = tasks.get(retried.id, {}).get("state") == "SUCCESS"
        return tasks if done and states == {state: state for state in sent} else {}

    tasks = poll(shown, "Flower to have all four")
    success, failure = tasks[sent["SUCCESS"].id], tasks[sent["FAILURE"].id]
    assert (success["name"], success["worker"]) == ("one", worker.name)
    assert success["result"] == "'TEXT'"
    assert success["runtime"] > 0.01
    assert success["received"] <= success["started"] <= success["succeeded"]
    assert "no second call" in failure["exception"]
    assert "RuntimeError" in failure["traceback"]
    assert tasks[retried.id]["retries"] == 2
    detail = flower.get(f"api/task/info/{sent['SUCCESS'].id}")
    assert (detail["state"], detail["kwargs"]) == ("SUCCESS", "{'alias': 'slow'}")
    assert set(flower.get("api/tasks", state="FAILURE", workername=worker.name)) >= {sent["FAILURE"].id}


def test_flower_counts_tasks_for_prometheus(worker: Worker, flower: Flower) -> None:
    results = [worker.send("encode", "text") for _ in range(5)]
    worker.settle(results)

    def counted() -> bool:
        metrics = flower.text("metrics")
        lines = [line for line in metrics.splitlines() if f'worker="{worker.name}"' in line]
        succeeded = [line for line in lines if 'type="task-succeeded"' in line and 'task="encode"' in line]
        online = [line for line in lines if line.startswith("flower_worker_online")]
        return any(line.endswith(" 5.0") for line in succeeded) and any(line.endswith(" 1.0") for line in online)

    poll(counted, "five tasks and one worker in Flower's metrics")


def test_flower_sends_a_task_and_gets_its_result(worker: Worker, flower: Flower) -> None:
    if worker.broker.backend.startswith("rpc"):
        pytest.skip("a result by rpc is for the thread that sent the task, and Flower reads it in another")
    sent = flower.post("api/task/send-task/no_model", args=[41])
    assert flower.get(f"api/task/result/{sent['task-id']}", timeout=30)["result"] == 42
