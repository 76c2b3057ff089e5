"""The built-in tasks of every other kind give what sentence-transformers gives: sparse, a vector per token, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import tiny_models
from harness import StartWorker, Worker

from legit_worker.errors import InvalidInputError, UnknownModelError

TEXTS = ["red apple", "the old dog runs to the river, and the sea is blue: who is it?", "a cat sat on the mat " * 6]

PAIRS = [["red", text] for text in TEXTS]

#: What a batch may change in the last digits of a float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

TASKS = [(None, "encode"), ("query", "encode_query"), ("document", "encode_document")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, tiny_paths: dict[str, Path]) -> dict[str, Path]:
    """A model of each of these kinds."""
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "sparse": tiny_paths["sparse"],
        "multi": tiny_models.build_multi(folder / "multi"),
        "rerank": tiny_models.build_cross_encoder(folder / "labels", labels=3),
    }


@pytest.fixture(scope="module")
def library(paths: dict[str, Path]) -> dict[str, Any]:
    """The library's own objects."""
    return {
        "sparse": sentence_transformers.SparseEncoder(str(paths["sparse"]), device="cpu"),
        "multi": sentence_transformers.MultiVectorEncoder(str(paths["multi"]), device="cpu"),
        "rerank": sentence_transformers.CrossEncoder(str(paths["rerank"]), device="cpu"),
    }


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker, paths: dict[str, Path]) -> Worker:
    """One worker with all of them."""
    variables = {f"LEGIT_WORKER_MODELS__{kind.upper()}__KIND": kind for kind in paths}
    variables |= {f"LEGIT_WORKER_MODELS__{kind.upper()}__PATH": str(path) for kind, path in paths.items()}
    return start_module_worker("legit_worker", environment=variables)


def dense(row: dict[str, Any], width: int) -> Any:
    """A sparse row in full."""
    assert row.keys() == {"indices", "values"}
    found = np.zeros(width, dtype=np.float32)
    found[row["indices"]] = row["values"]
    return found


@pytest.mark.parametrize(("task", "method"), TASKS)
def test_sparse_vectors_are_the_librarys(
    worker: Worker, library: dict[str, Any], task: str | None, method: str
) -> None:
    expected = getattr(library["sparse"], method)(TEXTS).to_dense().numpy()
    rows = worker.ask("legit_worker.embed_sparse", TEXTS, task=task)
    np.testing.assert_allclose([dense(row, expected.shape[1]) for row in rows], expected, **CLOSE)
    one = worker.ask("legit_worker.embed_sparse", TEXTS[0], task=task)
    np.testing.assert_allclose(dense(one, expected.shape[1]), expected[0], **CLOSE)


def test_a_sparse_vector_may_be_shortened(worker: Worker) -> None:
    [row] = worker.ask("legit_worker.embed_sparse", TEXTS[:1], max_active=4)
    assert len(row["indices"]) == len(row["values"]) == 4
    with pytest.raises(InvalidInputError, match="max_active must be a whole number of at least 1, got 0"):
        worker.ask("legit_worker.embed_sparse", "red", max_active=0)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"prompt": "find: "}])
@pytest.mark.parametrize(("task", "method"), TASKS)
def test_vectors_of_tokens_are_the_librarys(
    worker: Worker, library: dict[str, Any], task: str | None, method: str, options: dict[str, Any]
) -> None:
    theirs = {"normalize_embeddings" if name == "normalize" else name: value for name, value in options.items()}
    expected = getattr(library["multi"], method)(TEXTS, convert_to_numpy=True, **theirs)
    found = worker.ask("legit_worker.embed_multi", TEXTS, task=task, **options)
    assert [np.shape(rows) for rows in found] == [rows.shape for rows in expected]
    for own, rows in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, rows, **CLOSE)
    np.testing.assert_allclose(
        worker.ask("legit_worker.embed_multi", TEXTS[0], task=task, **options), expected[0], **CLOSE
    )


def test_labels_are_scored_best_first(worker: Worker, library: dict[str, Any]) -> None:
    expected = library["rerank"].predict(PAIRS, apply_softmax=True)
    rows = worker.ask("legit_worker.classify", PAIRS)
    assert {one["label"] for one in rows[0]} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    for row, scores in zip(rows, expected, strict=True):
        assert [one["label"] for one in row] == [f"LABEL_{place}" for place in np.argsort(-scores)]
        np.testing.assert_allclose([one["score"] for one in row], np.sort(scores)[::-1], **CLOSE)
    [best] = worker.ask("legit_worker.classify", PAIRS[0], top_k=1)
    assert best["label"] == rows[0][0]["label"]


@pytest.mark.parametrize(
    ("task", "value", "message"),
    [
        ("classify", "red", "expected a pair of two texts, got str"),
        ("classify", [["red", "cat"], ["red"]], "item 1: expected a pair of two texts"),
        ("classify", [["red", ""]], "item 0: the text is empty"),
        ("embed_sparse", ["red", " "], "item 1: the text is empty"),
        ("embed_multi", 7, "expected text, got int"),
    ],
)
def test_what_a_kind_does_not_take_is_refused(worker: Worker, task: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        worker.ask(f"legit_worker.{task}", value)


def test_a_classifier_says_which_task_it_is_for(worker: Worker) -> None:
    with pytest.raises(InvalidInputError, match=r"so use legit_worker\.classify"):
        worker.ask("legit_worker.rerank", "red", TEXTS)
    with pytest.raises(UnknownModelError, match="the one model of kind 'embed'"):
        worker.ask("legit_worker.embed_text", "red")
