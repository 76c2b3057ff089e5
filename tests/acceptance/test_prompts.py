"""Queries and documents, from clients that send a name and a text: by task, by alias, and by way of the prep stage.

What sentence-transformers gives is the measure. The same by handles: `tests/integration/test_models.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import tiny_models
from appqueues import AppQueue
from harness import StartWorker, Worker

from legit_worker.errors import InvalidInputError

TEXTS = ["red apple", "the old dog runs to the river, and the sea is blue: who is it?", "a cat sat on the mat " * 6]

#: What a batch may change in the last digits of a float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

#: Tokens that the alias `short` reads.
SHORT = 9

#: The aliases of one model: their settings, and what the library's user writes in their place.
ALIASES: dict[str, tuple[dict[str, str], str, dict[str, Any]]] = {
    "e5": ({}, "encode", {}),
    "e5_query": ({"PROMPT_NAME": "query"}, "encode", {"prompt_name": "query"}),
    "e5_document": ({"TASK": "document"}, "encode_document", {}),
    "e5_own": ({"PROMPT": "Find the river: "}, "encode", {"prompt": "Find the river: "}),
    "e5_small": (
        {"DIMENSIONS": "12", "NORMALIZE": "1", "TASK": "query"},
        "encode_query",
        {"truncate_dim": 12, "normalize_embeddings": True},
    ),
    "e5_bits": ({"PRECISION": "ubinary"}, "encode", {"precision": "ubinary"}),
}

#: A task's arguments, and what the library's user writes in their place.
OPTIONS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"task": "query"}, "encode_query", {}),
    ({"task": "document"}, "encode_document", {}),
    ({"task": "query", "prompt": "what is "}, "encode_query", {"prompt": "what is "}),
    ({"task": "document", "prompt_name": "query"}, "encode_document", {"prompt_name": "query"}),
    ({"prompt_name": "document"}, "encode", {"prompt_name": "document"}),
    ({"prompt": "the dog "}, "encode", {"prompt": "the dog "}),
    ({"prompt": ""}, "encode", {"prompt": ""}),
    ({"dimensions": 8}, "encode", {"truncate_dim": 8}),
    ({"dimensions": 8, "normalize": True}, "encode", {"truncate_dim": 8, "normalize_embeddings": True}),
    ({"precision": "binary"}, "encode", {"precision": "binary"}),
    ({"precision": "int8"}, "encode", {"precision": "int8"}),
    ({"precision": "uint8", "task": "query"}, "encode_query", {"precision": "uint8"}),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, tiny_paths: dict[str, Path]) -> dict[str, Path]:
    """A model with prompts, one that has a prompt before every text, and one with a route of its own for queries."""
    folder = tmp_path_factory.mktemp("prompted")
    return {
        "e5": tiny_paths["embed"],
        "bge": tiny_models.build_dense(folder / "default", "query"),
        "apart": tiny_models.build_dense(folder / "apart", include_prompt=False),
        "routed": tiny_models.build_routed(folder / "routed"),
    }


@pytest.fixture(scope="module")
def library(paths: dict[str, Path]) -> dict[str, Any]:
    """The library's own objects."""
    return {name: sentence_transformers.SentenceTransformer(str(path), device="cpu") for name, path in paths.items()}


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker, paths: dict[str, Path]) -> Worker:
    """One worker with all of them, and several aliases of the first and the last."""
    models = {name: {"PATH": str(path)} for name, path in paths.items()}
    models |= {alias: {"PATH": str(paths["e5"]), **own} for alias, (own, _, _) in ALIASES.items()}
    models["e5_short"] = {"PATH": str(paths["e5"]), "MAX_SEQ_LENGTH": str(SHORT)}
    models["e5_other"] = {"PATH": str(paths["e5"]), "DTYPE": "bfloat16"}
    models |= {f"routed_{task}": {"PATH": str(paths["routed"]), "TASK": task} for task in ("query", "document")}
    variables = {
        f"LEGIT_WORKER_MODELS__{alias.upper()}__{name}": value
        for alias, own in models.items()
        for name, value in own.items()
    }
    variables["LEGIT_WORKER_APPS__SEARCH__RESULT_ROUTING"] = "on"
    return start_module_worker("legit_worker", environment=variables)


def embed(worker: Worker, text: Any, model: str, **options: Any) -> Any:
    return worker.ask("legit_worker.embed_text", text, model=model, **options)


def assert_is(answer: Any, expected: Any) -> None:
    """The answer is what JSON makes of the library's array."""
    got = np.array(answer)
    assert got.shape == expected.shape
    assert got.dtype.kind == expected.dtype.kind.replace("u", "i")
    is_scaled = (
        expected.dtype.kind in "iu" and expected.shape[-1] > 8
    )  # a last digit may be on the other side of a step
    np.testing.assert_allclose(got, expected, **({"atol": 1} if is_scaled else CLOSE))


@pytest.mark.parametrize(("options", "method", "theirs"), OPTIONS, ids=lambda value: str(value)[:40])
def test_a_task_says_what_its_texts_are(
    worker: Worker, library: dict[str, Any], options: dict[str, Any], method: str, theirs: dict[str, Any]
) -> None:
    assert_is(embed(worker, TEXTS, "e5", **options), getattr(library["e5"], method)(TEXTS, **theirs))
    if options.get("precision", "binary") == "binary":
        assert_is(embed(worker, TEXTS[0], "e5", **options), getattr(library["e5"], method)(TEXTS[0], **theirs))


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_says_what_its_texts_are(worker: Worker, library: dict[str, Any], alias: str) -> None:
    _, method, theirs = ALIASES[alias]
    assert_is(embed(worker, TEXTS, alias), getattr(library["e5"], method)(TEXTS, **theirs))


def test_a_task_knows_better_than_its_alias(worker: Worker, library: dict[str, Any]) -> None:
    assert_is(embed(worker, TEXTS, "e5_query", task="document"), library["e5"].encode_document(TEXTS))
    assert_is(embed(worker, TEXTS, "e5_own", prompt_name="query"), library["e5"].encode(TEXTS, prompt_name="query"))
    small = library["e5"].encode_query(TEXTS, truncate_dim=4)
    assert_is(embed(worker, TEXTS, "e5_small", dimensions=4, normalize=False), small)


@pytest.mark.parametrize("task", ["query", "document"])
def test_a_model_with_routes_takes_the_one_of_the_task_or_the_alias(
    worker: Worker, library: dict[str, Any], task: str
) -> None:
    expected = getattr(library["routed"], f"encode_{task}")(TEXTS)
    assert_is(embed(worker, TEXTS, "routed", task=task), expected)
    assert_is(embed(worker, TEXTS, f"routed_{task}"), expected)


def test_an_alias_reads_fewer_tokens_than_its_model(worker: Worker, library: dict[str, Any]) -> None:
    library["e5"].max_seq_length, before = SHORT, library["e5"].max_seq_length
    try:
        expected = library["e5"].encode(TEXTS), library["e5"].encode_query(TEXTS)
    finally:
        library["e5"].max_seq_length = before
    assert_is(embed(worker, TEXTS, "e5_short"), expected[0])
    assert_is(embed(worker, TEXTS, "e5_short", task="query"), expected[1])
    assert_is(embed(worker, TEXTS, "e5"), library["e5"].encode(TEXTS))
    with pytest.raises(InvalidInputError, match=rf"over|tokens and the model takes {SHORT}"):
        embed(worker, TEXTS, "e5_short", truncate=False)


def test_a_prompt_counts_when_the_length_is_checked(worker: Worker) -> None:
    text = "cat " * (tiny_models.MAX_TOKENS - 3)
    embed(worker, text, "e5", truncate=False)
    with pytest.raises(InvalidInputError, match=f"the model takes {tiny_models.MAX_TOKENS}"):
        embed(worker, text, "e5", truncate=False, task="query")


def test_aliases_that_differ_in_what_they_ask_share_one_copy_of_the_weights(worker: Worker) -> None:
    for alias in (*ALIASES, "e5_short", "e5_other"):
        embed(worker, "red", alias)
    pool = worker.pool()
    models = pool["models"]
    sharing = {alias for alias, model in models.items() if model.get("shares") == "e5"}
    assert sharing == {*ALIASES, "e5_short"} - {"e5"}
    assert models["e5"]["loads"] == models["e5_other"]["loads"] == 1
    assert models["e5_query"] == {"kind": "embed", "state": "resident", "shares": "e5"}
    resident = [model for model in models.values() if model["state"] == "resident" and "shares" not in model]
    assert pool["memory"]["weights"] == sum(model["weights"] for model in resident)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "title"}, "task must be query or document, got 'title'"),
        ({"prompt_name": "passage"}, "prompt_name='passage' is not among this model's prompts: .*query"),
        ({"prompt_name": "query", "prompt": "q: "}, "prompt or prompt_name, not both"),
        ({"prompt": 7}, "prompt must be a string, got int"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"dimensions": 0}, "dimensions must be a whole number of at least 1, got 0"),
        ({"dimensions": True}, "dimensions must be a whole number"),
        ({"precision": "float8"}, "precision must be one of float32, int8"),
        ({"precision": "int8"}, "one vector has none: send several texts"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(worker: Worker, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        embed(worker, "red", "e5", **options)


@pytest.mark.parametrize(
    ("alias", "options", "dimensions", "dtype", "prompt"),
    [
        ("e5", {}, 32, "float32", None),
        ("e5_query", {}, 32, "float32", "query: "),
        ("e5", {"task": "document", "dimensions": 16}, 16, "float32", "document: "),
        ("e5_bits", {}, 32, "ubinary", None),
        ("e5_other", {}, 32, "bfloat16", None),
    ],
)
def test_an_app_is_told_what_computed_its_vectors(
    worker: Worker, alias: str, options: dict[str, Any], dimensions: int, dtype: str, prompt: str | None
) -> None:
    queue = AppQueue(worker.broker.url, "search.results")
    sent = worker.client.send_task(
        "legit_worker.embed_text", ("red",), {"model": alias, **options}, headers={"app": "search"}
    )
    queue.wait_for([sent.id])
    [envelope] = [one for one in queue.seen if one["id"] == sent.id]
    told = envelope["computed_by"]
    assert envelope["model"] == alias
    assert told.pop("revision").startswith("sha256:")
    assert told == {"dimensions": dimensions, "dtype": dtype, "prompt": prompt, "backend": "torch"}


# By way of the prep stage.


@pytest.mark.parametrize(
    ("alias", "options"),
    [
        ("e5", {}),
        ("e5", {"task": "query"}),
        ("e5", {"prompt": "the dog "}),
        ("e5", {"prompt_name": "document"}),
        ("e5_query", {}),
        ("e5_document", {}),
        ("e5_short", {"task": "query"}),
        ("bge", {}),
        ("bge", {"task": "document"}),
        ("bge", {"prompt": ""}),
        ("apart", {}),
        ("routed_query", {}),
    ],
)
def test_a_prepared_text_has_the_vector_of_the_text(worker: Worker, alias: str, options: dict[str, Any]) -> None:
    expected = np.array(embed(worker, TEXTS, alias, **options))
    prepared = worker.ask("legit_worker.prep_text", TEXTS, model=alias, **options)
    assert_is(embed(worker, prepared, alias), expected)
    assert_is(embed(worker, prepared, alias, **options), expected)


def test_the_prompt_before_every_text_is_known_to_prep(worker: Worker, library: dict[str, Any]) -> None:
    prepared = worker.ask("legit_worker.prep_text", TEXTS, model="bge")
    assert {piece["prompt"] for piece in prepared} == {"query: "}
    assert_is(embed(worker, prepared, "bge"), library["bge"].encode(TEXTS))


def test_a_text_prepared_with_another_prompt_is_refused(worker: Worker) -> None:
    prepared = worker.ask("legit_worker.prep_text", "red", model="e5", task="query")
    with pytest.raises(InvalidInputError, match="prepared with the prompt 'query: ', and the prompt here is 'document"):
        embed(worker, prepared, "e5", task="document")
    del prepared["prompt"]
    with pytest.raises(InvalidInputError, match="prepared with the prompt '', and the prompt here is 'query: '"):
        embed(worker, prepared, "bge")


@pytest.mark.parametrize("alias", ["apart", "routed"])
def test_prep_refuses_what_only_the_model_can_do(worker: Worker, alias: str) -> None:
    assert worker.ask("legit_worker.prep_text", "red", model=alias) == "red"
    with pytest.raises(InvalidInputError, match="can't be prepared for task: send the text itself to embed_text"):
        worker.ask("legit_worker.prep_text", "red", model=alias, task="query")


def test_each_piece_of_a_text_has_the_prompt(worker: Worker, library: dict[str, Any]) -> None:
    words = ["red", "cat", "dog", "mat", "apple", "river", "old"] * 4
    pieces = worker.ask("legit_worker.prep_text", " ".join(words), model="e5", chunk_tokens=12, task="document")
    step = 12 - 2 - len(library["e5"].tokenizer.tokenize("document: "))
    cut = [" ".join(words[start : start + step]) for start in range(0, len(words), step)]
    assert [len(piece["ids"]) for piece in pieces[:-1]] == [12] * (len(pieces) - 1)
    assert_is(embed(worker, pieces, "e5"), library["e5"].encode_document(cut))
    with pytest.raises(InvalidInputError, match="chunk_tokens is 4, and this model takes from 5 to 64"):
        worker.ask("legit_worker.prep_text", "red", model="e5", chunk_tokens=4, task="document")


def test_a_text_may_have_more_pieces_than_a_task_may_have_items(worker: Worker, library: dict[str, Any]) -> None:
    text = "cat " * 2100
    pieces = worker.ask("legit_worker.prep_text", text, model="e5", chunk_tokens=3)
    assert len(pieces) == 2100
    vectors = np.array(embed(worker, pieces, "e5"))
    assert vectors.shape == (2100, 32)
    np.testing.assert_allclose(vectors[-1], library["e5"].encode("cat"), **CLOSE)
    nested = embed(worker, [pieces, pieces[:2]], "e5")
    assert [len(rows) for rows in nested] == [2100, 2]
