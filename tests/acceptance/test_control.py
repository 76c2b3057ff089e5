"""Remote control: what an operator asks of a worker and tells it, by the client's API and by the `celery` command.

Each test that takes `worker` runs under stock solo and under ModelPool. What stock solo can't do, because it hears
nothing while a task runs and has no pool to grow, is tested of ModelPool alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from commands import celery
from harness import (
    GREEDY,
    INSPECT_SECONDS,
    LATE,
    SIDES,
    Broker,
    Sides,
    StartWorker,
    Worker,
    poll,
)

Simulated = Callable[[Any], list[float]]

#: Tasks in flight when one of them is revoked.
IN_FLIGHT = 200

#: What stock solo's workers say of their pool, and tools read.
STOCK_POOL_KEYS = {"implementation", "max-concurrency", "processes", "put-guarded-by-semaphore", "timeouts"}

#: Batches of half a second, of eight tasks each.
HALF_SECONDS = {
    "LEGIT_WORKER_MODELS__SIM__PATH": "0.5,0",
    "LEGIT_WORKER_MAX_BATCH_SECONDS": "2",
    "LEGIT_WORKER_WINDOW": "8",
}


@pytest.fixture(scope="module", params=SIDES)
def worker(request: pytest.FixtureRequest, start_module_worker: StartWorker) -> Worker:
    """One worker a side that this file's tests share."""
    return Sides(start_module_worker, "controlled").worker(request.param)


@pytest.fixture(scope="module")
def model_pool(start_module_worker: StartWorker) -> Worker:
    """A worker under ModelPool that this file's tests share."""
    return Sides(start_module_worker, "controlled").worker("modelpool")


@pytest.fixture
def controlled(start_worker: StartWorker) -> Sides:
    """Workers of this test's own."""
    return Sides(start_worker, "controlled")


def ask(worker: Worker, command: str, **arguments: Any) -> Any:
    """What this worker replies to a command, of either kind."""
    worker.wait_until_it_hears()
    replies = worker.client.control.broadcast(
        command, arguments=arguments, destination=[worker.name], reply=True, timeout=INSPECT_SECONDS
    )
    assert replies, f"{worker.name} did not reply to {command}:\n{worker.tail()}"
    return replies[0][worker.name]


def ids(infos: list[dict[str, Any]]) -> set[str]:
    """The tasks that a reply lists."""
    return {info["id"] for info in infos}


def sizes(worker: Worker) -> tuple[int, int]:
    """The window, and how many tasks the broker hands over before it waits for an ack."""
    stats = worker.stats()
    return stats["pool"]["window"], stats["prefetch_count"]


# What a worker tells of itself.


def test_a_worker_answers_a_ping(worker: Worker) -> None:
    worker.wait_until_it_hears()
    assert worker.client.control.ping([worker.name], timeout=INSPECT_SECONDS) == [{worker.name: {"ok": "pong"}}]


def test_a_worker_tells_its_tasks_with_their_rate_limits(worker: Worker) -> None:
    ask(worker, "rate_limit", task_name="encode", rate_limit="100/s")
    told = ask(worker, "registered")
    assert {"one", "no_model", "encode [rate_limit=100/s]"} <= set(told)
    ask(worker, "rate_limit", task_name="encode", rate_limit=None)
    assert "encode" in ask(worker, "registered")


def test_a_worker_tells_its_settings(worker: Worker) -> None:
    conf = ask(worker, "conf", with_defaults=True)
    assert conf["task_default_queue"] == worker.broker.queue
    assert conf["task_track_started"] is True
    assert "worker_prefetch_multiplier" in conf


def test_a_worker_tells_its_statistics(worker: Worker) -> None:
    before = worker.stats()
    worker.answers([worker.send("no_model", number) for number in range(10)])
    after = worker.stats()
    assert after["total"]["no_model"] == before["total"].get("no_model", 0) + 10
    assert after["pid"] == worker.pid
    assert after["pool"].keys() >= STOCK_POOL_KEYS
    assert after["pool"]["processes"] == [worker.pid]
    assert after.keys() >= {"broker", "clock", "prefetch_count", "rusage", "total", "uptime"}


def test_a_worker_tells_its_queues(worker: Worker) -> None:
    (queue,) = ask(worker, "active_queues")
    assert (queue["name"], queue["routing_key"]) == (worker.broker.queue, worker.broker.queue)


def test_a_worker_with_nothing_to_do_says_so(worker: Worker) -> None:
    worker.ask("one", "text")
    assert ask(worker, "active") == []
    assert ask(worker, "query_task", ids=["nobody's"]) == {}


def test_a_projects_own_commands_are_heard(worker: Worker) -> None:
    assert ask(worker, "set_factor", factor=7) == {"ok": "factor is 7"}
    assert ask(worker, "get_factor") == 7


@pytest.mark.parametrize(
    ("command", "arguments", "reply"),
    [
        ("time_limit", {"task_name": "limited", "soft": 100.0, "hard": 200.0}, {"ok": "time limits set successfully"}),
        ("time_limit", {"task_name": "nobody", "soft": 1.0, "hard": 2.0}, {"error": "unknown task"}),
        ("rate_limit", {"task_name": "nobody", "rate_limit": "1/s"}, {"error": "unknown task"}),
        ("rate_limit", {"task_name": "no_model", "rate_limit": 0}, {"ok": "rate limit disabled successfully"}),
        ("enable_events", {}, {"ok": "task events enabled"}),
        ("enable_events", {}, {"ok": "task events already enabled"}),
        ("disable_events", {}, {"ok": "task events disabled"}),
        ("pool_restart", {}, {"error": "ValueError('Pool restarts not enabled')"}),
        ("nonsense", {}, {"error": "KeyError('nonsense')"}),
    ],
)
def test_a_command_gets_the_reply_that_celery_documents(
    worker: Worker, command: str, arguments: dict[str, Any], reply: dict[str, str]
) -> None:
    assert ask(worker, command, **arguments) == reply


# What a worker does when it is told to.


def test_a_rate_limit_spreads_tasks_over_time_until_it_is_lifted(worker: Worker) -> None:
    assert ask(worker, "rate_limit", task_name="no_model", rate_limit="10/s") == {
        "ok": "new rate limit set successfully"
    }
    results = [worker.send("no_model", number) for number in range(6)]
    assert worker.answers(results) == list(range(1, 7))
    ends = sorted(result.date_done for result in results)
    assert (ends[-1] - ends[0]).total_seconds() > 0.4, "six tasks, a tenth of a second apart"
    ask(worker, "rate_limit", task_name="no_model", rate_limit=None)
    assert worker.answers([worker.send("no_model", number) for number in range(50)]) == list(range(1, 51))


def test_tasks_that_a_rate_limit_holds_hold_up_nobody(worker: Worker) -> None:
    ask(worker, "rate_limit", task_name="limited", rate_limit="1/h")
    first, *held = [worker.send("limited", number) for number in range(4)]
    assert worker.answer(first) == 0
    poll(lambda: {result.id for result in held} <= worker.received, "the worker to receive the rest")
    assert worker.answers([worker.send("no_model", number) for number in range(20)]) == list(range(1, 21))
    assert {result.state for result in held} == {"PENDING"}


def test_a_task_that_is_due_later_is_scheduled_and_can_be_revoked(worker: Worker) -> None:
    soon, late = [worker.client.send_task("one", [text], countdown=1) for text in ("revoked", "kept")]
    poll(lambda: {soon.id, late.id} <= worker.received, "both to be received")
    scheduled = {entry["request"]["id"]: entry for entry in ask(worker, "scheduled")}
    assert {soon.id, late.id} <= scheduled.keys()
    assert scheduled[soon.id]["eta"]
    ask(worker, "revoke", task_id=soon.id)
    assert soon.id in ask(worker, "revoked")
    assert worker.answer(late)
    with pytest.raises(TaskRevokedError):
        worker.answer(soon)
    assert not {soon.id, late.id} & {entry["request"]["id"] for entry in ask(worker, "scheduled")}


@pytest.fixture
def second_queue(worker: Worker) -> Iterator[str]:
    """A queue of this test's own, which the worker no longer consumes from when the test is over."""
    name = f"{worker.broker.queue}.second"
    yield name
    ask(worker, "cancel_consumer", queue=name)
    poll(lambda: name not in queues(worker), "the queue to be cancelled")


def queues(worker: Worker) -> list[str]:
    """The names of the queues that the worker consumes from."""
    return [queue["name"] for queue in ask(worker, "active_queues")]


def test_a_queue_is_added_and_cancelled_while_the_worker_runs(worker: Worker, second_queue: str) -> None:
    def send(number: int) -> AsyncResult[Any]:
        return worker.client.send_task("no_model", [number], queue=second_queue)

    early = send(1)
    assert ask(worker, "add_consumer", queue=second_queue) == {"ok": f"add consumer {second_queue}"}
    assert worker.answers([early, send(2)]) == [2, 3]
    assert set(queues(worker)) == {worker.broker.queue, second_queue}
    reply = ask(worker, "cancel_consumer", queue=second_queue)
    assert reply == {"ok": f"no longer consuming from {second_queue}"}
    poll(lambda: queues(worker) == [worker.broker.queue], "the queue to be cancelled")
    left = send(3)
    assert worker.answers([worker.send("no_model", number) for number in range(20)]) == list(range(1, 21))
    assert left.state == "PENDING"
    ask(worker, "add_consumer", queue=second_queue)
    assert worker.answer(left) == 4


def test_a_task_that_is_revoked_while_it_is_queued_never_runs(worker: Worker, second_queue: str) -> None:
    revoked, kept = [
        worker.client.send_task("tidies", [f"{text} {second_queue}", "sim"], queue=second_queue)
        for text in ("revoked", "kept")
    ]
    ask(worker, "revoke", task_id=revoked.id)
    ask(worker, "add_consumer", queue=second_queue)
    assert worker.answer(kept)
    with pytest.raises(TaskRevokedError):
        worker.answer(revoked)
    worker.wait_for_log(f"Discarding revoked task: tidies[{revoked.id}]")
    assert f"kept {second_queue} was computed" in worker.log
    assert f"revoked {second_queue} was computed" not in worker.log


def test_tasks_are_revoked_by_their_stamp(worker: Worker, second_queue: str) -> None:
    marked, other = [worker.client.signature("no_model", [number], queue=second_queue) for number in (1, 2)]
    marked.stamp(tenant="gone")
    other.stamp(tenant="stays")
    revoked, kept = marked.apply_async(), other.apply_async()
    ask(worker, "revoke_by_stamped_headers", headers={"tenant": ["gone"]})
    ask(worker, "add_consumer", queue=second_queue)
    assert worker.answer(kept) == 3
    with pytest.raises(TaskRevokedError):
        worker.answer(revoked)


@pytest.mark.parametrize("side", SIDES)
def test_a_remote_shutdown_is_a_warm_one(controlled: Sides, broker: Broker, side: str) -> None:
    worker = controlled.worker(side, broker=broker)
    result = worker.send("one", "text", alias="slow_to_load")
    poll(lambda: result.state == "STARTED", "the task to start")
    worker.client.control.shutdown(destination=[worker.name])
    assert worker.wait() == 0
    assert result.get(timeout=1) == "TEXT"
    assert "Got shutdown from remote" in worker.log
    assert "Traceback" not in worker.log


# The commands, as an operator types them.


def run_celery(worker: Worker, *arguments: str) -> Any:
    """What a `celery` command printed for this worker, with `--json`."""
    words = (*arguments, "--json", f"--destination={worker.name}", "--timeout=10")
    finished = celery("controlled", *words, broker=worker.broker)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[0])


def test_celery_inspect_and_celery_control_print_what_the_worker_replied(worker: Worker) -> None:
    worker.ask("no_model", 1)
    assert run_celery(worker, "inspect", "stats")[worker.name]["total"]["no_model"] >= 1
    assert run_celery(worker, "inspect", "query_task", "an-id", "another-id") == {worker.name: {}}
    limited = run_celery(worker, "control", "rate_limit", "encode", "100/s")
    assert limited == [{worker.name: {"ok": "new rate limit set successfully"}}]
    assert run_celery(worker, "status") == {worker.name: {"ok": "pong"}}


# What only a pool whose tasks park can do.


@pytest.mark.parametrize("kind", ["broker", "rabbitmq"])
def test_a_ping_is_answered_within_a_second_while_batches_of_half_a_second_run(
    controlled: Sides, request: pytest.FixtureRequest, kind: str
) -> None:
    worker = controlled.worker("modelpool", broker=request.getfixturevalue(kind), **HALF_SECONDS)
    results = [worker.send("one", f"text {number}") for number in range(56)]
    poll(lambda: results[0].ready(), "the first batch")
    pongs = 0
    while not results[-1].ready():
        assert worker.client.control.ping([worker.name], timeout=1) == [{worker.name: {"ok": "pong"}}]
        pongs += 1
    assert pongs > 3, "the batches were over before the worker was asked: this shows nothing"
    worker.settle(results)
    assert worker.pool()["mean_batch"] > 2, "nothing was batched: this shows nothing"


def test_tasks_that_are_parked_are_active(model_pool: Worker) -> None:
    results = [model_pool.send("one", f"text {number}", alias="slow") for number in range(200)]
    active = poll(lambda: ask(model_pool, "active"), "tasks that are active")
    assert ids(active) <= {result.id for result in results}
    info = active[0]
    assert (info["name"], info["hostname"], info["worker_pid"]) == ("one", model_pool.name, model_pool.pid)
    assert (info["kwargs"], info["acknowledged"]) == ({"alias": "slow"}, False)
    assert info["time_start"]
    found = poll(lambda: ask(model_pool, "query_task", ids=[result.id for result in results]), "one that still is")
    known = {task: state for task, (state, _) in found.items()}
    assert set(known) <= {result.id for result in results}
    assert set(known.values()) <= {"active", "reserved"}
    assert "active" in known.values()
    assert all(same["id"] == task for task, (_, same) in found.items())
    model_pool.settle(results)
    assert ask(model_pool, "active") == []


def test_of_two_hundred_tasks_in_flight_the_right_one_is_terminated(
    controlled: Sides, broker: Broker, simulated: Simulated
) -> None:
    """They wait for their model to load: 199 get what is theirs."""
    worker = controlled.worker("modelpool", broker=broker, **LATE, **GREEDY)
    results = [worker.send("tidies", f"text {number}", "late") for number in range(IN_FLIGHT)]
    poll(lambda: worker.pool()["parked"] == IN_FLIGHT, "all of them to park")
    (revoked,) = results[77:78]
    reply = ask(worker, "revoke", task_id=revoked.id, terminate=True)
    assert reply == {"ok": f"terminate: {revoked.id}"}
    assert worker.pool()["in_flight"] == IN_FLIGHT - 1
    assert "text 77 tidied up" in worker.log, "its own code was unwound, at once"
    others = [result for result in results if result is not revoked]
    assert worker.answers(others) == [simulated(f"text {number}") for number in range(IN_FLIGHT) if number != 77]
    with pytest.raises(TaskRevokedError):
        worker.answer(revoked)
    assert "text 77 was computed" not in worker.log
    assert worker.log.count("tidied up") == IN_FLIGHT
    assert worker.pool()["in_flight"] == 0
    assert worker.stop() == 0


def test_a_task_is_terminated_in_the_middle_of_its_work(controlled: Sides, broker: Broker) -> None:
    worker = controlled.worker("modelpool", broker=broker, LEGIT_WORKER_MODELS__SIM__PATH="0.02,0")
    stops, goes_on = worker.send("works_on", "stops", 100_000), worker.send("works_on", "goes on", 60)
    worker.wait_for_log("stops did step 10")
    ask(worker, "terminate", signal="KILL", task_id=stops.id)
    worker.settle([stops, goes_on])
    assert (stops.state, goes_on.state) == ("REVOKED", "SUCCESS")
    assert worker.log.count("tidied up") == 2
    last = worker.log.count("stops did step")
    worker.ask("one", "another turn of the loop")
    assert worker.log.count("stops did step") == last


def test_a_task_may_ask_for_its_own_termination(model_pool: Worker) -> None:
    result, other = model_pool.send("revokes_itself", "text"), model_pool.send("one", "text")
    model_pool.settle([result, other])
    assert (result.state, other.state) == ("REVOKED", "SUCCESS")


def test_a_task_that_waits_for_room_in_the_window_is_reserved_and_can_be_terminated(
    controlled: Sides, broker: Broker
) -> None:
    """With early acks the broker hands over more than the window holds."""
    worker = controlled.worker("modelpool", broker=broker, LEGIT_WORKER_WINDOW="4", PROJECT_ACKS_LATE="0", **LATE)
    results = [worker.send("tidies", f"text {number}", "late") for number in range(8)]
    reserved = poll(lambda: ask(worker, "reserved"), "tasks that wait for room")
    waiting = next(result for result in results if result.id == reserved[0]["id"])
    assert ask(worker, "query_task", ids=[waiting.id])[waiting.id][0] == "reserved"
    assert ids(ask(worker, "active")) == {result.id for result in results[:4]}
    ask(worker, "revoke", task_id=waiting.id, terminate=True)
    worker.settle(results)
    assert [result.state for result in results if result is not waiting] == ["SUCCESS"] * 7
    assert waiting.state == "REVOKED"
    assert f"text {results.index(waiting)} tidied up" not in worker.log


@pytest.mark.parametrize("kind", ["broker", "rabbitmq"])
def test_the_window_and_the_prefetch_grow_and_shrink_together(
    controlled: Sides, request: pytest.FixtureRequest, kind: str
) -> None:
    """By what the worker says, and by what the broker hands over: no more than the window, and no less."""
    worker = controlled.worker(
        "modelpool", broker=request.getfixturevalue(kind), LEGIT_WORKER_WINDOW="8", PROJECT_ACKS_LATE="1", **LATE
    )
    assert sizes(worker) == (8, 8)
    results = [worker.send("one", f"text {number}", alias="late") for number in range(40)]
    poll(lambda: len(worker.received) == 8, "the first window")
    assert ask(worker, "pool_grow", n=4) == {"ok": "pool will grow"}
    assert sizes(worker) == (12, 12)
    poll(lambda: worker.pool()["parked"] == 12, "four more")
    assert not any(result.ready() for result in results), "the model had loaded: this shows nothing"
    assert ask(worker, "pool_shrink", n=9) == {"ok": "pool will shrink"}
    assert sizes(worker) == (3, 3)
    worker.settle(results)
    worker.ask("one", "text", alias="even")  # tasks that wait for its load would not count

    def largest_batch() -> int:
        """Of thirty tasks more. A batch may begin before the last message of a window has come."""
        worker.settle([worker.send("one", f"text {number}", alias="even") for number in range(30)])
        return max(int(count) for count in re.findall(r"computes (\d+) items", worker.log))

    poll(lambda: largest_batch() >= 3, "a batch of a whole window")
    assert largest_batch() == 3
    ask(worker, "pool_shrink", n=10)
    assert sizes(worker) == (1, 1)
    assert worker.ask("one", "text", alias="upper") == "TEXT"
