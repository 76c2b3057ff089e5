"""Time limits end a task as under prefork: in a model call, in its own code, and only the one that is late.

They count a task's own time, and so does the runtime that Celery tells: not what it waits for others. Stock solo has no
limits, so the stock side of these tests is prefork.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from harness import LATE, SIMULATED, StartWorker, Worker, poll

from legit_worker.errors import InvalidInputError, WaitedTooLongError

#: One whose batches take longer than tasks may, one that takes a fiftieth of a second per item, one that never comes.
MODELS = (
    SIMULATED
    | LATE
    | {
        "LEGIT_WORKER_DEVICE": "cpu",
        "LEGIT_WORKER_MODELS__LENGTHY__KIND": "limited:Lengthy",
        "LEGIT_WORKER_MODELS__SLOW__KIND": "custom_models:Slow",
        "LEGIT_WORKER_MODELS__NEVER__KIND": "simulated",
        "LEGIT_WORKER_MODELS__NEVER__PATH": "0,0,0,600",
    }
)

#: A pool that has time limits, and ours.
POOLS: dict[str, tuple[list[str], dict[str, str]]] = {
    "prefork": (["--pool=prefork", "--concurrency=2"], {}),
    "modelpool": (["--pool=solo"], {"LEGIT_WORKER_ENABLED": "1"}),
}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tasks note."""
    return tmp_path_factory.mktemp("journal") / "journal.txt"


@pytest.fixture(scope="module", params=POOLS)
def limited(request: pytest.FixtureRequest, start_module_worker: StartWorker, journal: Path) -> Worker:
    """A worker under prefork and then one under ModelPool."""
    return start(start_module_worker, request.param, journal)


def start(
    start_worker: StartWorker, pool: str, journal: Path, *arguments: str, wait: bool = True, **settings: str
) -> Worker:
    pool_arguments, environment = POOLS[pool]
    variables = MODELS | environment | {"PROJECT_JOURNAL": str(journal)} | settings
    return start_worker("limited", *pool_arguments, *arguments, pool=None, environment=variables, wait=wait)


def noted(journal: Path, line: str) -> int:
    return journal.read_text().splitlines().count(line) if journal.exists() else 0


PLACES = ["in_a_model_call", "in_its_own_code", "in_a_loop"]


def failure(worker: Worker, task: str, *args: Any, **options: Any) -> Any:
    """How a task with these options ends that is expected to fail."""
    result = worker.client.send_task(task, args, **options)
    worker.settle([result])
    assert result.state == "FAILURE", result.result
    return result


@pytest.mark.parametrize("task", [*PLACES, "in_an_exclusive_section"])
def test_a_soft_limit_is_an_error_in_the_task(limited: Worker, journal: Path, task: str) -> None:
    item = f"{task} softly on {limited.name}"
    result = failure(limited, task, item, soft_time_limit=1)
    assert isinstance(result.result, SoftTimeLimitExceeded)
    limited.wait_for_log(f"Soft time limit (1s) exceeded for {task}[{result.id}]")
    if task in PLACES[:2]:
        assert noted(journal, f"{item} cleaned up") == 1


@pytest.mark.parametrize("task", [*PLACES, "in_an_exclusive_section", "ignores_the_warning"])
def test_a_hard_limit_ends_the_task_and_tells_all_who_are_to_know(limited: Worker, journal: Path, task: str) -> None:
    before = noted(journal, "signal TimeLimitExceeded"), noted(journal, "errback called")
    soft = 0.5 if task == "ignores_the_warning" else None
    errback = limited.client.signature("told", immutable=True)
    result = failure(limited, task, task, soft_time_limit=soft, time_limit=1, link_error=errback)
    assert isinstance(result.result, TimeLimitExceeded)
    assert result.result.args == (1,)
    limited.wait_for_log(f"Hard time limit (1s) exceeded for {task}[{result.id}]")
    poll(lambda: noted(journal, "signal TimeLimitExceeded") > before[0], "the signal")
    poll(lambda: noted(journal, "errback called") > before[1], "the errback")


def test_a_task_that_swallows_its_hard_limit_fails_with_it(start_worker: StartWorker, tmp_path: Path) -> None:
    worker = start(start_worker, "modelpool", tmp_path / "journal")
    assert isinstance(failure(worker, "swallows_all", "text", time_limit=0.5).result, TimeLimitExceeded)
    assert noted(tmp_path / "journal", "text swallowed it")


#: Tasks whose outermost code is Celery's, and what is sent for them.
WRAPPED: dict[str, tuple[str, list[Any]]] = {
    "autoretry_for": ("retried_by_celery", ["text"]),
    "pydantic": ("checked_by_pydantic", ["text"]),
    "__call__": ("called", ["text"]),
    "map": ("celery.map", [{"task": "mapped", "args": [], "kwargs": {}, "options": {}}, ["text"]]),
    "starmap": ("celery.starmap", [{"task": "mapped", "args": [], "kwargs": {}, "options": {}}, [["text"]]]),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_limit_reaches_a_task_whose_outermost_code_is_celerys(limited: Worker, wrapped: str) -> None:
    name, arguments = WRAPPED[wrapped]
    assert isinstance(failure(limited, name, *arguments, soft_time_limit=1).result, SoftTimeLimitExceeded)
    assert isinstance(failure(limited, name, *arguments, time_limit=1).result, TimeLimitExceeded)


def test_a_task_may_take_the_warning_and_end_in_its_own_way(limited: Worker) -> None:
    result = limited.client.send_task("saves_what_it_can", ["text"], soft_time_limit=1)
    assert limited.answer(result) == "text saved with 8 numbers"


def test_a_task_may_limit_itself_and_a_message_beats_it(limited: Worker) -> None:
    assert isinstance(failure(limited, "limited_by_itself", "text").result, SoftTimeLimitExceeded)
    longer = failure(limited, "limited_by_itself", "text", soft_time_limit=2)
    limited.wait_for_log(f"Soft time limit (2s) exceeded for limited_by_itself[{longer.id}]")


def test_a_task_that_ends_in_time_is_not_touched(limited: Worker) -> None:
    results = [
        limited.client.send_task("in_its_own_code", [f"text {number}", 0], soft_time_limit=30, time_limit=60)
        for number in range(20)
    ]
    assert limited.answers(results) == [f"text {number}" for number in range(20)]


@pytest.mark.parametrize("pool", POOLS)
def test_limits_of_the_whole_worker_hold_where_a_task_has_none(
    start_worker: StartWorker, tmp_path: Path, pool: str
) -> None:
    worker = start(start_worker, pool, tmp_path / "journal", "--soft-time-limit=1", "--time-limit=30")
    assert isinstance(failure(worker, "in_a_model_call", "text").result, SoftTimeLimitExceeded)
    assert [round(limit) for limit in worker.pool()["timeouts"]] == [1, 30]


def test_of_two_hundred_tasks_only_those_end_whose_own_time_is_over(start_worker: StartWorker, tmp_path: Path) -> None:
    """All wait longer than they may take, for a model to load."""
    worker = start(start_worker, "modelpool", tmp_path / "journal", LEGIT_WORKER_MAX_BATCH_SECONDS="0.1")
    send = worker.client.send_task
    healthy = [send("in_a_model_call", [f"text {number}", "late"], soft_time_limit=1) for number in range(200)]
    alone = send("alone", ["text", "late"], soft_time_limit=1, time_limit=2)
    late = [send("in_its_own_code", [f"late {number}"], soft_time_limit=1) for number in range(2)]
    worker.settle([*healthy, alone, *late])
    assert all(result.successful() for result in (*healthy, alone))
    assert [type(result.result) for result in late] == [SoftTimeLimitExceeded] * 2


def test_a_wait_for_its_turn_is_told_beside_the_runtime_and_not_in_it(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start(start_worker, "modelpool", tmp_path / "journal", LEGIT_WORKER_MAX_BATCH_SECONDS="0.1")
    limit = 1.5
    results = [
        worker.client.send_task("in_a_model_call", [f"text {number}", "slow"], soft_time_limit=limit)
        for number in range(200)
    ]
    worker.settle(results)
    assert all(result.successful() for result in results)
    told = re.findall(r"succeeded in ([\d.e-]+)s, waited ([\d.]+)s: ", worker.log)
    assert len(told) > 100, worker.tail()
    assert max(float(runtime) for runtime, _ in told) < limit < max(float(waited) for _, waited in told)
    pool = worker.pool()
    assert limit < pool["worst_recent_wait_seconds"] < pool["waited_seconds"]


def test_a_task_that_waits_for_nothing_has_a_log_line_as_under_stock(limited: Worker) -> None:
    result = limited.client.send_task("in_its_own_code", ["text", 0.2])
    limited.answer(result)
    line = poll(lambda: re.search(rf"\[{result.id}\] succeeded in ([\d.]+)s: 'text'", limited.log), "its line")
    assert float(line[1]) >= 0.2


def test_the_batches_of_an_exclusive_section_count(start_worker: StartWorker, tmp_path: Path) -> None:
    worker = start(start_worker, "modelpool", tmp_path / "journal")
    assert isinstance(failure(worker, "alone", "text", "lengthy", soft_time_limit=1).result, SoftTimeLimitExceeded)
    result = worker.send("alone", "text", "lengthy")
    worker.answer(result)
    line = poll(lambda: re.search(rf"\[{result.id}\] succeeded in ([\d.]+)s: ", worker.log), "its line")
    assert float(line[1]) >= 1.5


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_helpers_work_counts_and_the_wait_for_a_free_helper_does_not(
    start_worker: StartWorker, tmp_path: Path, is_alone: bool
) -> None:
    worker = start(start_worker, "modelpool", tmp_path / "journal", LEGIT_WORKER_PREP_PROCESSES="1")
    worker.ask("prepared", 0)  # the helper has started
    results = [worker.client.send_task("prepared", [0.7, is_alone], soft_time_limit=1.5) for _ in range(4)]
    assert worker.answers(results) == [0.7] * 4
    runtimes = [float(runtime) for runtime in re.findall(r"succeeded in ([\d.]+)s[^:]*: 0.7", worker.log)]
    assert len(runtimes) == 4
    # What the helper says reaches the worker by another thread.
    assert all(0.65 <= runtime < 1.5 for runtime in runtimes)
    late = failure(worker, "prepared", 20, is_alone, soft_time_limit=1)
    assert isinstance(late.result, SoftTimeLimitExceeded)


@pytest.mark.parametrize("task", ["in_a_model_call", "alone"])
def test_a_bound_on_waiting_fails_a_task_with_both_numbers(
    start_worker: StartWorker, tmp_path: Path, task: str
) -> None:
    worker = start(start_worker, "modelpool", tmp_path / "journal", LEGIT_WORKER_MAX_WAIT_SECONDS="1.5")
    # Neither is a task's own time waiting, nor a batch.
    assert worker.ask("in_its_own_code", "text", 2) == "text"
    assert worker.ask("in_a_model_call", "text", "lengthy") == "TEXT"
    result = failure(worker, task, "text", "never")
    assert isinstance(result.result, WaitedTooLongError)
    found = re.search(r"has waited for ([\d.]+) s in all, now for model never to load", str(result.result))
    assert found
    assert 1.5 <= float(found[1]) < 30
    assert "LEGIT_WORKER_MAX_WAIT_SECONDS is 1.5" in str(result.result)


#: What clients of other languages may send as a limit, and the seconds that it means.
NUMBERS = [("1", 1), ("0.5", 0.5), (0, None), ("0", None), (None, None)]

#: The same, and it means nothing.
NO_NUMBERS = ["x", [1], {"seconds": 1}, -1, "-1", float("nan"), "NaN", float("inf"), True]


@pytest.fixture(scope="module")
def judge(start_module_worker: StartWorker, journal: Path) -> Worker:
    """A worker that gets odd limits."""
    return start(start_module_worker, "modelpool", journal)


@pytest.mark.parametrize(("limit", "seconds"), NUMBERS)
def test_a_limit_may_be_a_number_in_text(judge: Worker, limit: Any, seconds: float | None) -> None:
    if seconds is None:
        assert judge.answer(judge.client.send_task("in_its_own_code", ["text", 1.2], soft_time_limit=limit)) == "text"
    else:
        result = failure(judge, "in_its_own_code", "text", headers={"timelimit": [None, limit]})
        assert isinstance(result.result, SoftTimeLimitExceeded)
        judge.wait_for_log(f"Soft time limit ({seconds}s) exceeded for in_its_own_code[{result.id}]")


@pytest.mark.parametrize(
    "header", [*([limit, None] for limit in NO_NUMBERS), *([None, limit] for limit in NO_NUMBERS), 5, "5", [1, 2, 3]]
)
def test_a_limit_that_is_no_number_fails_its_task_alone(judge: Worker, journal: Path, header: Any) -> None:
    if not judge.broker.url.startswith("redis") and ("nan" in repr(header) or "inf" in repr(header)):
        pytest.skip("RabbitMQ ends a connection that brings such a number")
    errback = judge.client.signature("told", immutable=True)
    before = noted(journal, "signal InvalidInputError"), noted(journal, "errback called")
    result = failure(judge, "in_its_own_code", "text", headers={"timelimit": header}, link_error=errback)
    assert isinstance(result.result, InvalidInputError)
    assert f"timelimit={header!r}" in str(result.result)
    assert f"in_its_own_code[{result.id}]" in str(result.result)
    poll(lambda: noted(journal, "signal InvalidInputError") > before[0], "the signal")
    poll(lambda: noted(journal, "errback called") > before[1], "the errback")
    # The message is acked, others go on, and limits hold.
    poll(lambda: not judge.inspect().active()[judge.name], "it to be over")
    assert isinstance(failure(judge, "in_its_own_code", "text", soft_time_limit=0.5).result, SoftTimeLimitExceeded)


def test_a_limit_of_the_worker_that_is_no_number_stops_it_at_its_start(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    good = start(start_worker, "modelpool", tmp_path / "journal", PROJECT_SOFT_TIME_LIMIT="1")
    assert isinstance(failure(good, "in_its_own_code", "text").result, SoftTimeLimitExceeded)
    bad = start(start_worker, "modelpool", tmp_path / "journal", wait=False, PROJECT_SOFT_TIME_LIMIT="soon")
    assert bad.wait() != 0
    assert "the worker's soft time limit is 'soon'" in bad.log
    assert "Traceback" not in bad.log


def test_a_task_with_a_hard_limit_that_is_not_to_be_acked_is_sent_again(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start(start_worker, "modelpool", tmp_path / "journal", PROJECT_ACKS_ON_TIMEOUT="0")
    worker.client.send_task("in_a_model_call", ["text"], time_limit=0.5)
    poll(lambda: worker.log.count("received") >= 3, "the task to come again")


@pytest.mark.parametrize("transport", ["filesystem"])
def test_a_task_on_a_transport_without_an_event_loop_has_limits_too(
    start_worker: StartWorker, servers: Any, tmp_path: Path, transport: str
) -> None:
    broker = servers.fresh(broker_url="filesystem://")
    variables = MODELS | {"LEGIT_WORKER_ENABLED": "1", "PROJECT_JOURNAL": str(tmp_path / "journal")}
    worker = start_worker("limited", broker=broker, environment=variables)
    for task in ("in_its_own_code", "in_an_exclusive_section"):
        assert isinstance(failure(worker, task, "text", soft_time_limit=1).result, SoftTimeLimitExceeded)
        assert isinstance(failure(worker, task, "text", time_limit=1).result, TimeLimitExceeded)
