"""The tables of `docs/library.md`: each row is called on a handle and on the library's object, and is as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import tiny_models
import torch

import legit_worker
from legit_worker.testing import use_models

PAGE = Path(__file__).parents[2] / "docs" / "library.md"

#: One row: what is called, and what it gives.
ROW = re.compile(r"\| `(.+)` \| (.+) \|")

#: What a batch may change in the last digits of a float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

TEXTS = ["a cat sat on the mat", "red", "the old dog runs to the river, and the sea is blue: who is it?"]

#: The library would fetch an address that is not marked as a text.
NOT_FETCHED, ADDRESS = "as for any text", re.compile('"https://.+?"')

ROWS = [found.groups() for found in map(ROW.fullmatch, PAGE.read_text().splitlines()) if found]


@pytest.fixture(scope="module")
def paths(tiny_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """The page's models, with their kinds."""
    labels = tiny_models.build_cross_encoder(tmp_path_factory.mktemp("labels"), labels=3)
    return {
        "model": ("embed", tiny_paths["embed"]),
        "ranker": ("rerank", tiny_paths["rerank"]),
        "classifier": ("rerank", labels),
        "sparse": ("sparse", tiny_paths["sparse"]),
        "multi": ("multi", tiny_models.build_multi(tmp_path_factory.mktemp("multi"))),
        "clip": ("image", tiny_paths["image"]),
        "both": ("image", tiny_models.build_text_and_image(tmp_path_factory.mktemp("both"))),
    }


@pytest.fixture(scope="module")
def library(paths: dict[str, tuple[str, Path]]) -> dict[str, Any]:
    """The library's own objects."""
    classes = {
        "rerank": sentence_transformers.CrossEncoder,
        "sparse": sentence_transformers.SparseEncoder,
        "multi": sentence_transformers.MultiVectorEncoder,
    }
    return {
        name: classes.get(kind, sentence_transformers.SentenceTransformer)(str(path), device="cpu")
        for name, (kind, path) in paths.items()
    }


@pytest.fixture(scope="module")
def handles(paths: dict[str, tuple[str, Path]]) -> Iterator[dict[str, Any]]:
    """A handle for each."""
    with use_models({name: {"kind": kind, "path": str(path)} for name, (kind, path) in paths.items()}):
        yield {name: legit_worker.model(name) for name in paths}


def called(expression: str, objects: dict[str, Any]) -> Any:
    """What a row's expression gives."""
    picture = tiny_models.picture(1)
    names = {
        "texts": TEXTS,
        "text": TEXTS[0],
        "pairs": [(TEXTS[0], text) for text in TEXTS],
        "vectors": np.eye(3, 32, dtype=np.float32),
        "tokens": np.eye(4, 12, dtype=np.float32),
        "picture": picture,
        "pixels": np.asarray(picture),
        "identity": torch.nn.Identity(),
        "numpy": np,
    }
    return eval(expression, {**names, **objects})


def test_the_page_has_all_its_rows() -> None:
    assert len(ROWS) == sum(line.startswith("| `") for line in PAGE.read_text().splitlines())


@pytest.mark.parametrize(("expression", "gives"), ROWS, ids=[expression for expression, _ in ROWS])
def test_a_row_is_as_it_says(expression: str, gives: str, handles: dict[str, Any], library: dict[str, Any]) -> None:
    if gives.startswith("refused: "):
        with pytest.raises((ValueError, TypeError, AttributeError), match=re.escape(gives.removeprefix("refused: "))):
            called(expression, handles)
        return
    assert gives.startswith("the same")
    theirs = ADDRESS.sub(r'{"text": \g<0>}', expression) if NOT_FETCHED in gives else expression
    assert_same(called(expression, handles), called(theirs, library), gives)


def assert_same(own: Any, theirs: Any, gives: str) -> None:
    """The same value, shape and dtype; as numpy, where the row says so."""
    if "as a numpy array" in gives:
        theirs = theirs.numpy()
    if "as a sparse array" in gives:
        own, theirs = own.toarray(), theirs.to_dense().numpy()
    if isinstance(theirs, list) and isinstance(theirs[0], np.ndarray):
        assert [(row.shape, row.dtype) for row in own] == [(row.shape, row.dtype) for row in theirs]
        own, theirs = np.concatenate(own), np.concatenate(theirs)
    if isinstance(theirs, list):
        assert [{**row, "score": None} for row in own] == [{**row, "score": None} for row in theirs]
        own, theirs = ([row["score"] for row in rows] for rows in (own, theirs))
    assert type(own) is type(theirs)
    if isinstance(theirs, np.ndarray | np.generic):
        assert (own.shape, own.dtype) == (theirs.shape, theirs.dtype)
    if isinstance(theirs, np.ndarray | np.generic | list):
        np.testing.assert_allclose(own, theirs, **({"atol": 1} if theirs_is_int8(theirs) else CLOSE))
    else:
        assert own == theirs


def theirs_is_int8(theirs: Any) -> bool:
    """A last digit may be on the other side of a step."""
    return isinstance(theirs, np.ndarray) and theirs.dtype == np.int8 and theirs.shape[-1] > 8
