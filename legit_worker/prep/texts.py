"""Texts as token ids, by a model's own tokenizer, without the model and without torch.

In: a model's folder; texts. Out: JSON that `embed_text` takes in place of a text. The JSON has the tokenizer's
fingerprint: a hash of its ids for a few hard texts. So ids never reach a model with another tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.types import PreparedText

#: Texts on which two tokenizers must agree to count as one: case, scripts, white space, and more than any limit.
PROBES = ("A text.", "MIXED Case, ünïcödé, 中文, عربى 🎉 and\ttabs\n", " lead and trail ", "word " * 20_000)

#: Characters of a text's beginning for each token that a model takes: more than most texts have, in any language.
PER_TOKEN = 8

#: A beginning that has too few tokens is followed by one this many times as long.
LONGER = 4

#: Where a text can be cut without a change to the tokens before the cut: behind a letter that a single space and
#: another letter follow. Latin, Greek and Cyrillic letters only: no letter of theirs joins a space in any way.
_LETTER = "[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0388-\u03ff\u0400-\u0481\u048a-\u052f]"
CUT = re.compile(f"{_LETTER}(?= {_LETTER})")

#: The prompts of a model that has none, as in the library.
DEFAULT_PROMPTS = {"query": "", "document": ""}

#: What a model without a list of modules begins with.
PLAIN_MODULE = "sentence_transformers.models.Transformer"

#: Settings of that module under which a query is not tokenized as a document is.
BY_TASK = ("query_length", "document_length", "query_expansion")

#: Parts of a Rust tokenizer that treat each word alone, or each character, and the settings under which they do.
WORD_BY_WORD = {
    "BertNormalizer": {},
    "BertPreTokenizer": {},
    "ByteLevel": {"use_regex": True},
    "Lowercase": {},
    "Metaspace": {"split": True},
    "NFC": {},
    "NFD": {},
    "NFKC": {},
    "NFKD": {},
    "Precompiled": {},
    "Prepend": {},
    "Strip": {},
    "StripAccents": {},
    "WhitespaceSplit": {},
    "Whitespace": {},
}


def is_word_by_word(tokenizer: Any) -> bool:
    """Whether a text that is cut at `CUT` has the tokens that the whole text has there.

    Known for the usual parts of a Rust tokenizer. False for a part that nobody looked at.
    """
    splits = tokenizer.pre_tokenizer
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return (
        splits is not None
        and all(map(_is_word_by_word, filter(None, (tokenizer.normalizer, splits))))
        and not any(any(map(str.isspace, content)) for content in added)
    )


def _is_word_by_word(part: Any) -> bool:
    described = part if isinstance(part, dict) else json.loads(part.__getstate__())
    match described:
        case {"type": "Sequence", "normalizers": parts} | {"type": "Sequence", "pretokenizers": parts}:
            return all(map(_is_word_by_word, parts))
        case {"type": "Replace", "pattern": {"String": one}}:
            return len(one) == 1 and one != " " and not one.isalnum()
        case {"type": "Replace", "pattern": {"Regex": spaces}}:
            return bool(spaces == " {2,}")
    needed = WORD_BY_WORD.get(described["type"])
    return needed is not None and all(described.get(name) == value for name, value in needed.items())


def beginnings(text: str, tokens: int) -> Iterator[str]:
    """Beginnings of a text, cut at `CUT`, that may have this many tokens: each longer than the last, then all of it."""
    length = tokens * PER_TOKEN
    while (found := CUT.search(text, length, 2 * length)) is not None:
        yield text[: found.end()]
        length *= LONGER
    yield text


def fingerprint(tokenize: Callable[[str], Sequence[int]]) -> str:
    """Hash a tokenizer: a function from a text to its ids, cut at the model's limit."""
    return hashlib.sha256(json.dumps([list(tokenize(probe)) for probe in PROBES]).encode()).hexdigest()[:16]


class TextTokenizer:
    """A model's tokenizer, read from its `tokenizer.json`. Any thread may use it."""

    def __init__(self, file: Path, limit: int, prompts: Mapping[str, str], default: str | None = None) -> None:
        from tokenizers import Tokenizer

        self.limit = limit
        #: The model's prompts by name, and the name of the one that stands before every text.
        self.prompts, self.default = prompts, default
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._is_word_by_word = is_word_by_word(self._tokenizer)
        self._specials = self._tokenizer.num_special_tokens_to_add(False)
        #: Held from the choice of where a text is cut to the text's tokens: the Rust object keeps one choice for all.
        self._lock = threading.Lock()
        self.fingerprint = fingerprint(lambda text: self._tokens(text, limit).ids)

    def prepare(self, text: str, prompt: str | None = None, limit: int | None = None) -> PreparedText:
        """Tokenize a text behind its prompt, and cut it where the model would: after `limit` tokens, or its own."""
        limit = limit or self.limit
        whole = (prompt or "") + text
        for start in beginnings(whole, limit) if self._is_word_by_word else [whole]:
            found = self._tokens(start, limit)
            if found.overflowing:
                break
        return PreparedText(tuple(found.ids), self.fingerprint, cut=bool(found.overflowing), prompt=prompt)

    def chunks(
        self, text: str, tokens: int, overlap: int, prompt: str | None = None, limit: int | None = None
    ) -> list[PreparedText]:
        """Cut the text into pieces of at most `tokens`, special ones and the prompt included.

        Each piece has the prompt, and `overlap` tokens in common with the piece before it.
        """
        whole = self._tokens((prompt or "") + text, None)
        head, again = self._heads(whole, prompt or "")
        least = self._specials + max(len(head), len(again))
        if not least < tokens <= (limit or self.limit):
            raise InvalidInputError(
                f"chunk_tokens is {tokens}, and this model takes from {least + 1} to {limit or self.limit} tokens"
            )
        if not 0 <= overlap < tokens - least:
            raise InvalidInputError(
                f"overlap is {overlap}, and chunks of {tokens} tokens take from 0 to {tokens - least - 1}"
            )
        pieces = [whole.ids] if len(whole.ids) <= tokens else _cut(whole, head, again, tokens - least, overlap)
        return [PreparedText(tuple(ids), self.fingerprint, prompt=prompt) for ids in pieces]

    def _heads(self, whole: Any, prompt: str) -> tuple[list[int], list[int]]:
        """The tokens of the prompt alone: as they stand before the text, and as they stand before any other piece.

        The space at a prompt's end belongs to the word behind it. If its last letters do, too, they are in the first
        piece's text, and other pieces have the prompt as it is tokenized without a text.
        """
        end = len(prompt.rstrip())
        places = zip(whole.ids, whole.special_tokens_mask, whole.offsets, strict=True)
        tokens = [(number, start, stop) for number, special, (start, stop) in places if not special]
        head = list(itertools.takewhile(lambda token: token[1] < end and token[2] <= len(prompt), tokens))
        ids = [number for number, _, _ in head]
        joins = tokens[len(head) : len(head) + 1]
        is_joined = any(start < end for _, start, _ in joins)
        return ids, self._tokens(prompt, None, has_specials=False).ids if is_joined else ids

    def _tokens(self, text: str, limit: int | None, *, has_specials: bool = True) -> Any:
        """Tokenize a text, and cut it after `limit` tokens, or nowhere."""
        with self._lock:
            if limit is None:
                self._tokenizer.no_truncation()
            else:
                self._tokenizer.enable_truncation(limit)
            return self._tokenizer.encode(text, add_special_tokens=has_specials)


def _cut(whole: Any, head: list[int], again: list[int], room: int, overlap: int) -> Iterator[list[int]]:
    """Pieces of a text's tokens: special ones, the prompt, `room` tokens of the text at most, special ones."""
    ids, mask = whole.ids, whole.special_tokens_mask
    first, last = mask.index(0), len(mask) - mask[::-1].index(0)
    text = ids[first + len(head) : last]
    for start in range(0, max(1, len(text) - overlap), room - overlap):
        yield [*ids[:first], *(again if start else head), *text[start : start + room], *ids[last:]]


Found = TypeVar("Found")
Reader = Callable[[str, str | None], Found | None]


def kept_if_found(read: Reader[Found]) -> Reader[Found]:
    """Remember what the function finds in a model's files. If it finds nothing, look again: they may be there later."""
    known: dict[tuple[str, str | None], Found] = {}

    @functools.wraps(read)
    def remembered(path: str, revision: str | None = None) -> Found | None:
        key = (path, revision)
        if key not in known and (found := read(path, revision)) is not None:
            known[key] = found
        return known.get(key)

    return remembered


@kept_if_found
def tokenizer_of(path: str, revision: str | None = None) -> TextTokenizer | None:
    """Return the tokenizer of the model at a path, or of this name in the local Hugging Face cache.

    None if no tokenizer can be read without the model: the model's own worker then tokenizes.
    """
    folder = model_folder(path, revision)
    if folder is None or not _is_plain(folder):
        return None
    config = _read(folder / "config_sentence_transformers.json")
    prompts = DEFAULT_PROMPTS | {name: text or "" for name, text in (config.get("prompts") or {}).items()}
    for inner in (folder, folder / _first_module(folder)):
        limit = _read(inner / "sentence_bert_config.json").get("max_seq_length") or _read(
            inner / "tokenizer_config.json"
        ).get("model_max_length")
        if (inner / "tokenizer.json").is_file() and isinstance(limit, int) and 0 < limit < 2**20:
            return TextTokenizer(inner / "tokenizer.json", limit, prompts, config.get("default_prompt_name"))
    return None


def _is_plain(folder: Path) -> bool:
    """Whether the model takes a text's tokens as they are, behind a prompt's.

    It does not if it has routes, code of its own, a chat template, a length for queries, or a pooling without prompts.
    """
    found = _read(folder / "modules.json")
    modules = found if isinstance(found, list) else []
    kind = str(modules[0].get("type", "")) if modules else PLAIN_MODULE
    own = _read(folder / _first_module(folder) / "sentence_bert_config.json")
    poolings = (_read(folder / str(module.get("path", "")) / "config.json") for module in modules[1:])
    return (
        kind.startswith("sentence_transformers.")
        and kind.endswith(".Transformer")
        and not any(map(own.get, BY_TASK))
        and "message" not in own.get("modality_config", {})
        and not any(pooling.get("include_prompt") is False for pooling in poolings)
    )


def model_folder(path: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model's files on this machine; None if it has none."""
    if os.path.isdir(path):  # a class of a user's own may take anything as its path, however long
        return Path(path)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:  # no name on the Hub
        return None
    # The library takes a name without an organisation for one of its own, unless it is an old name of the Hub.
    names = (path,) if "/" in path else (path, f"sentence-transformers/{path}")
    return next((folder for name in names if (folder := _downloaded(name, revision))), None)


def _downloaded(name: str, revision: str | None) -> Path | None:
    """Return where the Hub's library keeps a model; None if it was not downloaded yet, or has no name of the Hub."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None


def _first_module(folder: Path) -> str:
    modules = _read(folder / "modules.json")
    return str(modules[0].get("path", "")) if isinstance(modules, list) and modules else ""


def _read(file: Path) -> Any:
    """Read a JSON file; an empty dictionary if it can't be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
