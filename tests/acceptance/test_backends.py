"""A worker whose model OpenVINO computes: the same answers, in batches, beside Celery's own work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import StartWorker, Worker

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

TEXTS = ["red", "the old dog runs to the river", "?", "word " * 40, "a cat sat on the mat"]

#: Seconds for three first loads, with their conversions and comparisons, beside other tests.
LOAD_SECONDS = 300

#: Tasks of one burst: several batches, of which one waits behind another.
TASKS = 200

#: The least cosine with what `SentenceTransformer.encode` gives for the text alone.
COSINE = 0.9999


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker, tiny_paths: dict[str, Path], cache: Path) -> Worker:
    """A worker with three models, by three backends."""
    settings = {"LEGIT_WORKER_CACHE_DIR": str(cache)}
    for alias, kind, backend in (
        ("FAST", "embed", "openvino"),
        ("RANKER", "rerank", "auto"),
        ("USUAL", "embed", "torch"),
    ):
        model = f"LEGIT_WORKER_MODELS__{alias}"
        settings |= {f"{model}__KIND": kind, f"{model}__PATH": str(tiny_paths[kind]), f"{model}__BACKEND": backend}
    worker = start_module_worker("legit_worker", environment=settings)
    loads = [worker.send("legit_worker.embed_text", "red", model=alias) for alias in ("fast", "usual")]
    loads.append(worker.send("legit_worker.rerank", "red", TEXTS, model="ranker"))
    worker.answers(loads, seconds=LOAD_SECONDS)
    return worker


@pytest.fixture(scope="module")
def library(tiny_paths: dict[str, Path]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_paths["embed"]), device="cpu")


def test_a_burst_of_texts_has_the_librarys_vectors(worker: Worker, library: Any) -> None:
    texts = [f"{TEXTS[number % len(TEXTS)]} {number}" for number in range(TASKS)]
    found = np.array(worker.answers([worker.send("legit_worker.embed_text", text, model="fast") for text in texts]))
    expected = library.encode(texts)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / lengths).min() >= COSINE
    counted = worker.pool()["models"]["fast"]
    assert counted["items"] + counted.get("duplicates", 0) >= TASKS  # long ones are cut, and then some are equal
    assert counted["batches"] < TASKS
    assert counted["forward_seconds"] > 0


def test_two_backends_of_one_worker_agree(worker: Worker) -> None:
    sent = [worker.send("legit_worker.embed_text", TEXTS, model=alias) for alias in ("fast", "usual")]
    fast, usual = (np.array(answer) for answer in worker.answers(sent))
    np.testing.assert_allclose(fast, usual, rtol=1e-4, atol=1e-5)


def test_the_choice_is_in_the_log_and_in_the_statistics(worker: Worker) -> None:
    worker.ask("legit_worker.rerank", "who is old", TEXTS, model="ranker")
    worker.ask("legit_worker.embed_text", "red", model="fast")
    worker.wait_for_log("model 'fast' is computed by openvino float32: worst cosine with torch 1.000000")
    models = worker.pool()["models"]
    worker.wait_for_log(f"model 'ranker' is computed by {models['ranker']['backend']}: auto: openvino takes ")
    assert models["fast"]["backend"] == "openvino float32"
    assert models["ranker"]["backend"] in ("openvino float32", "torch")
    assert models["ranker"]["backend_reason"].startswith("auto: openvino takes ")


def test_a_bad_text_fails_alone(worker: Worker) -> None:
    texts: list[Any] = [*TEXTS, 7, *TEXTS]
    results = [worker.send("legit_worker.embed_text", text, model="fast") for text in texts]
    worker.settle(results)
    assert [result.successful() for result in results] == [text != 7 for text in texts]


def test_a_kind_that_computes_by_itself_has_no_backend(
    start_worker: StartWorker, tiny_paths: dict[str, Path], cache: Path
) -> None:
    settings = {
        "LEGIT_WORKER_MODELS__FAKE__KIND": "simulated",
        "LEGIT_WORKER_MODELS__FAKE__BACKEND": "openvino",
        "LEGIT_WORKER_CACHE_DIR": str(cache),
    }
    with pytest.raises(Exception, match=r"MODELS__FAKE__BACKEND='openvino': kind 'simulated' computes by itself"):
        start_worker("legit_worker", environment=settings)
