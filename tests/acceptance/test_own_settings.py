"""What a task sets for itself, though the process has it once, is that task's alone; neighbours share its batch."""

from __future__ import annotations

import itertools
import re

import pytest
from harness import SIDES, Sides, StartWorker, Worker, poll

#: Gives what torch makes by itself: in which device and type, how products round, and the tensor's class.
PLAIN = ["cpu", "torch.float32", "highest", "Tensor"]

#: What each section makes of that in its own task.
SECTIONS = {
    "device": ["meta", *PLAIN[1:]],
    "default device": ["meta", *PLAIN[1:]],
    "default dtype": [PLAIN[0], "torch.float64", *PLAIN[2:]],
    "precision": [*PLAIN[:2], "medium", PLAIN[3]],
    "dispatch mode": [*PLAIN[:3], "FakeTensor"],
}


#: Models that take two seconds to load: tasks gather, and share the first batch. Each is for one test.
LATE = {f"LEGIT_WORKER_MODELS__LATE{number}__KIND": "custom_models:SlowToLoad" for number in range(3)}
IN_TORCH = {f"LEGIT_WORKER_MODELS__TORCH{number}__KIND": "custom_models:InTorch" for number in range(len(SECTIONS))}

_numbers = itertools.count()


@pytest.fixture
def setting(start_worker: StartWorker) -> Sides:
    """Workers of this test's own, with tasks that set things."""
    return Sides(start_worker, project="setting")


@pytest.fixture(scope="module", params=SIDES)
def either(request: pytest.FixtureRequest, start_module_worker: StartWorker) -> Worker:
    """A worker under stock Celery, and then one under ModelPool."""
    return Sides(start_module_worker, project="setting").worker(request.param)


@pytest.fixture(scope="module")
def pool(start_module_worker: StartWorker) -> Worker:
    """A worker under ModelPool that these tests share."""
    return Sides(start_module_worker, project="setting").worker("modelpool", **LATE, **IN_TORCH)


@pytest.fixture
def late() -> str:
    """A model that no other test has used."""
    return f"late{next(_numbers)}"


def test_filters_of_warnings(either: Worker) -> None:
    tasks = [("strict", "lax")[number % 2] for number in range(20)]
    results = [either.send(task, f"text {number}", "slow_to_load") for number, task in enumerate(tasks)]
    assert either.answers(results) == [[f"TEXT {number}", task == "strict"] for number, task in enumerate(tasks)]


@pytest.mark.parametrize("way", SECTIONS)
def test_torchs_modes_and_defaults(pool: Worker, way: str) -> None:
    alias = f"torch{list(SECTIONS).index(way)}"
    ways = [way if number % 3 == 1 else None for number in range(12)]
    results = [pool.send("in_torch", f"text {number}", alias, way) for number, way in enumerate(ways)]
    own = [SECTIONS[way] if way else PLAIN for way in ways]
    assert pool.answers(results) == [[PLAIN + PLAIN, made, made] for made in own]


def test_an_alarm_of_a_parked_task_rings_in_that_task_and_not_in_a_neighbour(pool: Worker, late: str) -> None:
    too_late = [pool.send("timed", f"text {number}", late, 0.5) for number in range(3)]
    in_time = [pool.send("timed", f"text {number}", late, 50) for number in range(3)]
    without = [pool.send("lax", f"text {number}", late) for number in range(3)]
    assert pool.answers(too_late) == [f"too late: text {number}" for number in range(3)]
    assert pool.answers(in_time) == [f"TEXT {number}" for number in range(3)]
    assert pool.answers(without) == [[f"TEXT {number}", False] for number in range(3)]


def test_an_alarm_that_rings_after_the_call_rings_in_its_task(either: Worker) -> None:
    results = [either.send("timed", f"text {number}", "upper", 0.3, 5) for number in range(4)]
    assert either.answers(results) == [f"too late: text {number}" for number in range(4)]


def test_an_alarm_rings_in_a_task_that_lets_no_other_run_while_a_model_loads(setting: Sides) -> None:
    worker = setting.worker("modelpool", LEGIT_WORKER_APPS__SHOP__BATCHING="off")
    result = worker.client.send_task("timed", ["text", "slow_to_load", 0.5], headers={"app": "shop"})
    assert worker.answer(result) == "too late: text"


def test_an_alarm_that_a_task_leaves_behind_is_cancelled_and_logged(pool: Worker, late: str) -> None:
    left = pool.send("leaves_alarm", "text", 0.5)
    pool.answer(left)
    assert pool.ask("timed", "text", late, 50, 1) == "TEXT"
    assert re.search(rf"leaves_alarm\[{left.id}\] ended with an alarm set", pool.log)


@pytest.mark.parametrize("side", SIDES)
def test_a_load_and_its_trial_batches_do_not_move_the_numbers_of_a_seed(setting: Sides, side: str) -> None:
    worker = setting.worker(side, LEGIT_WORKER_DEVICE="simulated")
    for alias in ("drawing", "drawing_too"):
        first, again = worker.ask("seeded", "text", alias, 7)
        assert first == again


def test_neighbours_and_batches_do_not_move_the_numbers_of_a_seed(pool: Worker) -> None:
    _, again = pool.ask("seeded", "text", "upper", 7)
    results = [pool.send("seeded", f"text {number}", "drawing", 7) for number in range(10)]
    assert pool.answers(results) == [[again, again]] * 10


def test_tasks_that_did_not_seed_draw_different_numbers(pool: Worker, late: str) -> None:
    results = [pool.send("unseeded", f"text {number}", late) for number in range(30)]
    results[10:10] = [pool.send("seeded", f"text {number}", late, 7) for number in range(3)]
    answers = pool.answers(results)
    drawn = [number for answer in answers if isinstance(answer[0], float) for number in answer]
    assert len(drawn) == 30 * 6
    assert len(set(drawn)) == len(drawn)
    poll(lambda: pool.pool()["in_flight"] == 0, "all tasks to be over")


def test_a_task_may_fork_while_a_model_is_imported(setting: Sides) -> None:
    """A child would wait for ever for a module that its parent's loader was importing."""
    worker = setting.worker("modelpool", LEGIT_WORKER_MODELS__IMPORTED__KIND="slow_import:Model")
    loads, forks = worker.send("lax", "text", "imported"), worker.send("forks", "text", "imported", 20)
    assert worker.answer(forks) == "TEXT"
    assert worker.answer(loads) == ["TEXT", False]


def test_defaults_of_torch_that_a_task_leaves_behind_go_with_it(pool: Worker) -> None:
    pool.ask("in_torch", "text", "in_torch", None)
    pool.ask("leaves_defaults", "text", "in_torch")
    for _ in range(2):
        assert pool.ask("in_torch", "text", "in_torch", None) == [PLAIN + PLAIN, PLAIN, PLAIN]


def test_a_forked_child_that_goes_on_with_the_task_is_ended(pool: Worker) -> None:
    assert pool.ask("child_returns", "text") == "text, by the parent"
    pool.wait_for_log("had forked came back into the worker")
    assert pool.ask("lax", "text", "upper") == ["TEXT", False]
