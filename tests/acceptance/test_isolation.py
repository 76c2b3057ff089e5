"""Tasks in one process don't see each other: thread, contextvars, signals, exclusive sections."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from harness import SIDES, Sides, Worker, poll

from legit_worker.errors import UnknownModelError


def test_tasks_run_in_the_main_thread_and_each_in_a_context_of_its_own(worker: Worker) -> None:
    results = [worker.send("context", f"item {number}") for number in range(100)]
    for number, (result, found) in enumerate(zip(results, worker.answers(results), strict=True)):
        assert found["main_thread"] is True
        assert found["after"] == f"item {number}"
        assert found["request"] == result.id
        assert found["inherited"] == "project"


def test_what_one_task_sets_in_its_context_is_not_there_for_the_next(model_pool: Worker) -> None:
    """Stock solo has one context for all tasks, so this is better than it, on purpose."""
    results = [model_pool.send("context", f"item {number}") for number in range(100)]
    assert {found["before"] for found in model_pool.answers(results)} == {None}


@pytest.mark.parametrize("side", SIDES)
def test_signals_fire_once_per_task_and_in_order(sides: Sides, side: str) -> None:
    worker = sides.worker(side, PROJECT_LOG_SIGNALS="1")
    good = [worker.send("one", f"text {number}").id for number in range(20)]
    bad = [worker.send("fails_between", f"text {number}").id for number in range(20)]
    fired = poll(lambda: len(signals := fired_by(worker)) >= 120 and signals, "all signals")
    assert Counter(fired) == Counter(
        [(signal, task) for task in good for signal in ("prerun", "success", "postrun")]
        + [(signal, task) for task in bad for signal in ("prerun", "failure", "postrun")]
    )
    for task in good + bad:
        assert [signal for signal, of in fired if of == task][::2] == ["prerun", "postrun"]


def test_no_other_task_runs_inside_an_exclusive_section(worker: Worker) -> None:
    results = []
    for number in range(40):
        results.append(worker.send("exclusive_pair", f"text {number}"))
        worker.send("step", f"text {number}")
    assert worker.answers(results) == [0] * 40


def test_tasks_do_interleave_at_model_calls_outside_of_one(model_pool: Worker) -> None:
    """What `exclusive` is for: without it, others run between two calls."""
    results = [model_pool.send("shared_pair", f"text {number}") for number in range(40)]
    for number in range(40):
        model_pool.send("step", f"text {number}")
    assert any(model_pool.answers(results))


def test_an_app_can_have_its_tasks_run_alone_to_their_end(sides: Sides) -> None:
    """Per app and by a variable, tasks have plain solo semantics: no other runs between their model calls."""
    worker = sides.worker("modelpool", LEGIT_WORKER_APPS__SHOP__BATCHING="off")
    results = []
    for number in range(40):
        headers = {"app": "shop"}
        results.append(worker.client.send_task("shared_pair", [f"text {number}"], headers=headers))
        worker.send("step", f"text {number}")
    assert worker.answers(results) == [0] * 40


def test_an_app_may_use_its_own_models_only(sides: Sides) -> None:
    worker = sides.worker("modelpool", LEGIT_WORKER_APPS__SHOP__MODELS="other,upper")
    allowed, refused = (
        worker.client.send_task("one", ["text"], {"alias": alias}, headers={"app": "shop"})
        for alias in ("upper", "sim")
    )
    assert worker.answer(allowed) == "TEXT"
    with pytest.raises(UnknownModelError, match=r"'shop'.*'sim'.*LEGIT_WORKER_APPS__SHOP__MODELS"):
        worker.answer(refused)
    worker.ask("one", "text")


def test_torchs_grad_mode_stays_with_the_task_that_set_it(worker: Worker) -> None:
    modes = [number % 2 == 0 for number in range(60)]
    results = [worker.send("grad_modes", f"text {number}", mode) for number, mode in enumerate(modes)]
    assert worker.answers(results) == [[True, mode, mode] for mode in modes]


def fired_by(worker: Worker) -> list[tuple[str, str]]:
    """Signals and task ids, in the log's order."""
    return re.findall(r"signal (prerun|postrun|success|failure) (\S+)", worker.log)
