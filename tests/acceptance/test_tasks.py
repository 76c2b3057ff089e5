"""Tasks of every shape answer under ModelPool what they answer under stock solo.

Each test that takes `worker` runs twice: on a project with `LEGIT_WORKER_ENABLED` unset, and on the same one with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import chord
from harness import Sides, Worker, poll

from legit_worker.errors import UnknownModelError

Simulated = Callable[[Any], list[float]]

#: Items of the largest call; with this model it takes some two seconds under ModelPool.
MANY = 10_000


def test_a_task_that_never_calls_a_model_is_answered(worker: Worker) -> None:
    results = [worker.send("no_model", number) for number in range(50)]
    assert worker.answers(results) == list(range(1, 51))


def test_each_of_many_single_item_tasks_gets_its_own_result(worker: Worker, simulated: Simulated) -> None:
    items = [f"text number {number} " + "word " * (number % 17) for number in range(200)]
    results = [worker.send("one", item) for item in items]
    assert worker.answers(results) == [simulated(item) for item in items]


def test_numbers_are_items_as_texts_are(worker: Worker, simulated: Simulated) -> None:
    assert worker.ask("one", 3) == simulated(3)


def test_one_text_gives_a_vector_and_a_list_gives_one_per_text(worker: Worker, simulated: Simulated) -> None:
    single, several, none = [worker.send("encode", texts) for texts in ("a text", ["a text", "another"], [])]
    assert worker.answer(single) == {"values": simulated("a text"), "shape": [8], "dtype": "float32"}
    expected = [simulated("a text"), simulated("another")]
    assert worker.answer(several) == {"values": expected, "shape": [2, 8], "dtype": "float32"}
    assert worker.answer(none)["shape"] == [0, 8]


def test_a_task_may_call_two_models(worker: Worker, simulated: Simulated) -> None:
    results = [worker.send("two_models", f"text {number}") for number in range(50)]
    for number, (first, second) in enumerate(worker.answers(results)):
        assert first == simulated(f"text {number}")
        assert second == simulated(f"text {number} {first[0]}")


def test_a_task_that_fails_between_two_calls_fails_with_its_own_error(worker: Worker, simulated: Simulated) -> None:
    failing = [worker.send("fails_between", f"text {number}") for number in range(20)]
    others = [worker.send("one", f"other {number}") for number in range(20)]
    for number, error in enumerate(worker.answers(failing)):
        assert isinstance(error, RuntimeError)
        assert str(error) == f"no second call after {simulated(f'text {number}')[0]}"
    assert worker.answers(others) == [simulated(f"other {number}") for number in range(20)]


def test_a_task_that_raises_before_it_calls_a_model_fails_alone(worker: Worker, simulated: Simulated) -> None:
    failing, other = worker.send("raises_before", "key"), worker.send("one", "text")
    assert worker.answer(other) == simulated("text")
    with pytest.raises(KeyError, match="key"):
        worker.answer(failing)


def test_a_task_may_call_a_model_in_a_loop(worker: Worker, simulated: Simulated) -> None:
    results = [worker.send("loop", f"text {number}", 5) for number in range(20)]
    for number, outputs in enumerate(worker.answers(results)):
        item = f"text {number}"
        for output in outputs:
            assert output == simulated(item)
            item = f"{item} {output[0]}"


def test_a_task_may_catch_a_models_error_and_go_on(worker: Worker, simulated: Simulated) -> None:
    assert worker.ask("catches", "bad item", "picky") == f"InvalidInputError {simulated('bad item')[0]}"


def test_a_task_is_retried_by_celery_as_ever(worker: Worker, simulated: Simulated) -> None:
    results = [worker.send("retries", f"text {number}") for number in range(5)]
    assert worker.answers(results) == [[2, simulated(f"text {number}")] for number in range(5)]


def test_a_task_that_is_due_later_is_answered(worker: Worker, simulated: Simulated) -> None:
    due = [worker.client.send_task("one", [f"due {number}"], countdown=0.5) for number in range(20)]
    now = [worker.send("one", f"now {number}") for number in range(20)]
    assert worker.answers(now) == [simulated(f"now {number}") for number in range(20)]
    assert worker.answers(due) == [simulated(f"due {number}") for number in range(20)]


def test_a_task_may_run_another_one_inside_itself(worker: Worker, simulated: Simulated) -> None:
    results = [worker.send("calls_another", f"text {number}") for number in range(20)]
    for number, (result, answer) in enumerate(zip(results, worker.answers(results), strict=True)):
        assert answer == [simulated(f"text {number}"), result.id]


def test_a_task_may_call_a_model_below_an_event_loop(worker: Worker, simulated: Simulated) -> None:
    results = [worker.send("in_asyncio", f"text {number}") for number in range(20)]
    others = [worker.send("one", f"other {number}") for number in range(20)]
    assert worker.answers(results) == [simulated(f"text {number}") for number in range(20)]
    assert worker.answers(others) == [simulated(f"other {number}") for number in range(20)]


def test_a_task_may_call_a_model_from_threads(worker: Worker, simulated: Simulated) -> None:
    items = [f"text {number}" for number in range(10)]
    results = [worker.send("in_threads", items) for _ in range(5)]
    assert worker.answers(results) == [[simulated(item) for item in items]] * 5


def test_a_task_may_call_a_model_from_a_generator(worker: Worker, simulated: Simulated) -> None:
    items = [f"text {number}" for number in range(10)]
    results = [worker.send("in_generator", items) for _ in range(5)]
    assert worker.answers(results) == [[simulated(item) for item in items]] * 5


def test_a_chord_gets_all_results_and_calls_a_model_itself(worker: Worker, simulated: Simulated) -> None:
    worker.broker.needs_stored_results()
    items = [f"text {number}" for number in range(20)]
    header = [worker.client.signature("one", [item]) for item in items]
    result = chord(header, app=worker.client)(worker.client.signature("collect", ["last"]))
    assert sorted(worker.answer(result)) == sorted(simulated(item) for item in [*items, "last"])


def test_an_unknown_alias_fails_with_the_aliases_that_there_are(worker: Worker) -> None:
    with pytest.raises(UnknownModelError, match=r"'nowhere'.*sim"):
        worker.ask("one", "text", alias="nowhere")


def test_ten_thousand_items_in_one_call_come_back_in_order(worker: Worker, simulated: Simulated) -> None:
    expected = [simulated(f"item {number}") for number in range(MANY)]
    assert worker.ask("many", MANY) == hashlib.sha256(json.dumps(expected).encode()).hexdigest()


def test_single_items_sent_after_ten_thousand_are_answered_before_them(
    model_pool: Worker, simulated: Simulated
) -> None:
    large = model_pool.send("many", MANY, alias="sluggish")
    poll(lambda: large.state == "STARTED", "the large task to start")
    small = [model_pool.send("one", f"text {number}", alias="sluggish") for number in range(20)]
    assert not large.ready(), "the large task was over before the small ones were sent: this shows nothing"
    assert model_pool.answers([*small, large])[:20] == [simulated(f"text {number}") for number in range(20)]
    assert max(result.date_done for result in small) < large.date_done


def test_single_items_of_another_model_are_not_kept_waiting_either(model_pool: Worker, simulated: Simulated) -> None:
    large = model_pool.send("many", MANY, alias="sluggish")
    poll(lambda: large.state == "STARTED", "the large task to start")
    small = [model_pool.send("one", f"text {number}") for number in range(20)]
    plain = [model_pool.send("no_model", number) for number in range(20)]
    assert not large.ready(), "the large task was over before the small ones were sent: this shows nothing"
    model_pool.settle([*small, *plain, large])
    assert max(result.date_done for result in [*small, *plain]) < large.date_done


def test_a_model_that_loads_slowly_keeps_nobody_else_waiting(model_pool: Worker, simulated: Simulated) -> None:
    slow = model_pool.send("one", "text", alias="slow_to_load")
    poll(lambda: slow.state == "STARTED", "the task that waits for the model")
    others = [model_pool.send("one", f"text {number}") for number in range(20)]
    model_pool.settle([slow, *others])
    assert slow.result == "TEXT"
    assert max(result.date_done for result in others) < slow.date_done


def test_tasks_that_arrive_while_torch_is_being_imported_wait_for_it(sides: Sides) -> None:
    """The loader thread imports it for the first model, and half-imported modules are there for all to see."""
    worker = sides.worker("modelpool", LEGIT_WORKER_DEVICE="auto")
    items = [f"text {number}" for number in range(300)]
    results = []
    for item in items:
        results.append(worker.send("one", item, alias="upper"))
        poll(lambda: results[-1].state != "PENDING", "the task to start")
    assert worker.answers(results) == [item.upper() for item in items]
