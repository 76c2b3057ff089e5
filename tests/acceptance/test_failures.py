"""An item that can't be computed, or a model that can't be loaded, fails who asked for it and nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import Worker

from legit_worker.errors import DeviceOutOfMemoryError, InvalidInputError, LegitWorkerError, ModelLoadError

Simulated = Callable[[Any], list[float]]


def test_a_refused_item_fails_its_own_task_and_its_neighbours_succeed(worker: Worker) -> None:
    items = [f"bad {number}" if number % 7 == 0 else f"good {number}" for number in range(100)]
    results = [worker.send("one", item, alias="picky") for item in items]
    for item, answer in zip(items, worker.answers(results), strict=True):
        if item.startswith("bad"):
            assert isinstance(answer, InvalidInputError)
            assert str(answer) == f"{item!r} is not to this model's taste"
        else:
            assert answer == item.upper()


def test_an_item_that_spoils_its_batch_fails_its_own_task_with_the_models_error(worker: Worker) -> None:
    items = [f"poison {number}" if number in (13, 14, 77) else f"good {number}" for number in range(100)]
    results = [worker.send("one", item, alias="poisoned") for item in items]
    for item, answer in zip(items, worker.answers(results), strict=True):
        if item.startswith("poison"):
            assert type(answer).__name__ == "PoisonError"
            assert str(answer) == f"{item} can't be computed"
        else:
            assert answer == item.upper()


@pytest.mark.parametrize(("how", "error"), [("exit", "SystemExit(3)"), ("interrupt", "KeyboardInterrupt()")])
def test_a_task_that_wants_to_end_its_process_fails_and_nobody_else_does(
    model_pool: Worker, how: str, error: str
) -> None:
    tasks = [("ends_badly", how) if number % 10 == 5 else ("one", "text") for number in range(50)]
    answers = model_pool.answers([model_pool.send(*task) for task in tasks])
    for task, answer in zip(tasks, answers, strict=True):
        if task[0] == "ends_badly":
            assert type(answer).__name__ == "WorkerLostError"
            assert error in str(answer)
        else:
            assert len(answer) == 8
    assert model_pool.pool()["in_flight"] == 0


@pytest.mark.parametrize("how", ["error", "memory", "end"])
def test_a_task_whose_error_can_not_be_shown_fails_and_nobody_else_does(model_pool: Worker, how: str) -> None:
    neighbours = [model_pool.send("one", "text") for _ in range(10)]
    guilty = model_pool.send("ends_mutely", how)
    model_pool.settle([*neighbours, guilty])
    assert guilty.state == "FAILURE"
    assert all(one.successful() for one in neighbours)
    assert model_pool.pool()["in_flight"] == 0


def test_what_would_end_a_process_is_the_guilty_tasks_error_if_a_model_raises_it(model_pool: Worker) -> None:
    """In any of a model's methods, and whatever it is: its batch-mates succeed, and the worker goes on."""
    errors = {
        "exit": "WorkerLostError.*SystemExit(3)",
        "interrupt": "WorkerLostError.*KeyboardInterrupt('by a model')",
        "memory": "MemoryError.*no room",
        "other": "WorkerLostError.*GeneratorExit()",
    }
    bad = [f"{method} {how}" for method in ("preprocess", "forward", "postprocess") for how in errors]
    items = [item for one in bad for item in (*[f"good {number}" for number in range(7)], one)]
    answers = model_pool.answers([model_pool.send("one", item, alias="violent") for item in items])
    for item, answer in zip(items, answers, strict=True):
        if item in bad:
            assert all(word in repr(answer) for word in errors[item.split()[1]].split(".*"))
        else:
            assert answer == item.upper()
    assert model_pool.pool()["in_flight"] == 0
    assert model_pool.ask("one", "text", alias="violent") == "TEXT"


def test_a_task_that_finds_no_memory_fails_and_nobody_else_does(model_pool: Worker) -> None:
    neighbours = [model_pool.send("one", "text") for _ in range(20)]
    answer = model_pool.answers([model_pool.send("ends_badly", "memory")])[0]
    assert "MemoryError" in repr(answer)
    assert all(len(one) == 8 for one in model_pool.answers(neighbours))
    assert model_pool.pool()["in_flight"] == 0


@pytest.mark.parametrize("how", ["exit", "interrupt", "memory"])
@pytest.mark.parametrize("method", ["preprocess", "cost", "forward", "postprocess"])
def test_a_model_that_would_end_its_process_fails_that_items_task_alone(
    model_pool: Worker, method: str, how: str
) -> None:
    items = [f"{method} {how}" if number % 10 == 5 else f"good {number}" for number in range(30)]
    results = [model_pool.send("one", item, alias="ending") for item in items]
    said = {"exit": "SystemExit(3)", "interrupt": "KeyboardInterrupt()", "memory": "too large"}[how]
    for item, answer in zip(items, model_pool.answers(results), strict=True):
        assert answer == item.upper() if item.startswith("good") else said in str(answer)
    assert model_pool.pool()["in_flight"] == 0


def test_a_storm_of_memory_errors_loses_no_task_and_what_never_fits_fails_alone(model_pool: Worker) -> None:
    """The device refuses every third batch, at random, and three items always."""
    items = [f"huge {number}" if number in (5, 700, 1500) else f"good {number}" for number in range(2000)]
    results = [model_pool.send("one", item, alias="stormy") for item in items]
    for item, answer in zip(items, model_pool.answers(results), strict=True):
        if item.startswith("huge"):
            assert isinstance(answer, DeviceOutOfMemoryError)
            assert "stormy" in str(answer)
            assert "2.00 GiB" in str(answer)
        else:
            assert answer == item.upper()
    assert model_pool.pool()["models"]["stormy"]["out_of_memory"] > 10
    assert model_pool.ask("one", "text") is not None


def test_a_model_that_can_not_be_loaded_fails_only_the_tasks_that_asked_for_it(
    worker: Worker, simulated: Simulated
) -> None:
    failing, others = [], []
    for number in range(20):
        failing.append(worker.send("one", f"text {number}", alias="unloadable"))
        others.append(worker.send("one", f"text {number}"))
    assert worker.answers(others) == [simulated(f"text {number}") for number in range(20)]
    for error in worker.answers(failing):
        assert isinstance(error, ModelLoadError)
        assert "unloadable" in str(error)
        assert "weights.bin is not there" in str(error)


def test_a_task_reads_its_models_error_as_it_was_raised(worker: Worker) -> None:
    with pytest.raises(InvalidInputError, match="takes strings and numbers, not list"):
        worker.ask("one", ["a", "list"])


def test_a_model_of_a_user_is_called_as_the_protocol_says(worker: Worker) -> None:
    assert worker.ask("one", "text", alias="upper") == "TEXT"


def test_a_model_may_call_another_one_while_it_prepares_an_item(worker: Worker) -> None:
    items = [("" if number % 3 else "slow_to_load:") + f"text {number}" for number in range(30)]
    results = [worker.send("one", item, alias="nested") for item in items]
    results += [worker.send("one", "text") for _ in range(10)]
    answers = worker.answers(results)
    for item, answer in zip(items, answers, strict=False):
        _, colon, text = item.rpartition(":")
        assert answer == text.upper() + ("!" if colon else "")
    assert worker.ask("one", "nested:upper:text", alias="nested") == "TEXT!!"


@pytest.mark.parametrize("method", ["cost", "batch_key", "forward", "postprocess"])
def test_a_model_that_calls_another_one_while_tasks_wait_for_it_is_told_so(worker: Worker, method: str) -> None:
    neighbours = [worker.send("one", "text", alias="nosy") for _ in range(5)]
    with pytest.raises(LegitWorkerError, match=rf"'nosy' calls model 'upper' in its {method}\(\).*preprocess\(\)"):
        worker.ask("one", method, alias="nosy")
    assert worker.answers(neighbours) == ["TEXT"] * 5


def test_a_model_that_calls_another_one_in_its_load_is_told_so(worker: Worker) -> None:
    with pytest.raises(ModelLoadError, match=r"'nosy_loader' calls model 'upper' in its load\(\)"):
        worker.ask("one", "text", alias="nosy_loader")


def test_a_model_of_a_user_has_the_methods_that_it_plans(worker: Worker) -> None:
    assert worker.ask("asks", "encode", "text", alias="planned") == "TEXT"
    assert worker.ask("asks", "encode", ["a", "b"], alias="planned", ending="!") == ["A!", "B!"]


def test_a_handle_says_which_method_a_model_lacks(worker: Worker) -> None:
    with pytest.raises(TypeError, match=r"'upper'.*no encode\(\).*plan_encode\(\)"):
        worker.ask("encode", "text", alias="upper")


def test_a_wrong_number_of_outputs_is_the_models_error_and_not_the_neighbours(worker: Worker) -> None:
    short, good = worker.send("one", "text", alias="forgetful"), worker.send("one", "text")
    worker.settle([short, good])
    assert good.successful()
    assert "forgetful" in str(short.result)
