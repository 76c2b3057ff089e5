"""What a loaded sentence-transformers model does with a plain text, found out by trying.

In: the library's object. Out: its tokenizer alone, if a text's features are the same by it as by the library's whole
preprocessing; and whether the model treats queries and documents apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from legit_worker.errors import InvalidInputError
from legit_worker.models.preparing import LONG
from legit_worker.prep.texts import PER_TOKEN, PROBES, PreparedText, beginnings, fingerprint, is_word_by_word


@dataclass(frozen=True)
class ShortWay:
    """A model's tokenizer alone: what it makes of a text is all that the library's own preprocessing makes of it."""

    tokenizer: Any
    limit: int | None
    #: Features that are the same for every text.
    rest: dict[str, Any]

    def __call__(self, text: str) -> dict[str, Any]:
        """The text's features, each a list with one number per token."""
        if self.backend is None:
            return {**self.tokenizer(text, truncation=True, max_length=self.limit), **self.rest}
        found = self._encode(text)
        of = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
        return {**{name: of[name] for name in self.tokenizer.model_input_names}, **self.rest}

    def _encode(self, text: str) -> Any:
        for start in self.beginnings(text):
            # Only the second way leaves the interpreter to other threads; the first takes less time.
            found = self.backend.encode(start) if len(start) < LONG else self.backend.encode_batch([start])[0]
            if found.overflowing:  # what comes after these tokens would be cut anyway
                break
        return found

    def beginnings(self, text: str) -> Iterable[str]:
        """Beginnings of a text, and then all of it. One that fills the model has the tokens that all of it has."""
        if self.limit is None or len(text) < self.limit * PER_TOKEN or not self._cuts_words_apart:
            return (text,)
        return beginnings(text, self.limit)

    def reads(self, text: str) -> int:
        """Characters that it reads of a text, if the first beginning is long enough."""
        return len(next(iter(self.beginnings(text))))

    @functools.cached_property
    def _cuts_words_apart(self) -> bool:
        below = self.backend
        return below is not None and self.tokenizer.truncation_side == "right" and is_word_by_word(below)

    @functools.cached_property
    def backend(self) -> Any:
        """The Rust tokenizer below the library's, with settings of its own; None where there is none.

        It takes a sixth of the time: the library looks at every option anew for each text.
        """
        below = getattr(self.tokenizer, "backend_tokenizer", None)
        if below is None:
            return None
        own = _twin(below)
        own.no_padding()
        if self.limit is None:
            own.no_truncation()
        else:
            own.enable_truncation(self.limit, direction=self.tokenizer.truncation_side)
        return own

    @functools.cached_property
    def fingerprint(self) -> str:
        """What a prepared text must have been prepared with."""
        return fingerprint(lambda text: self(text)["input_ids"])

    def of_ids(self, prepared: PreparedText) -> dict[str, Any]:
        """The features of a text that was tokenized elsewhere. Raises `InvalidInputError`."""
        if prepared.tokenizer != self.fingerprint:
            raise InvalidInputError(
                f"the text was prepared with tokenizer {prepared.tokenizer}, and this model's is {self.fingerprint}: "
                f"prepare it for the same model, and with the same version of its files"
            )
        if len(prepared.ids) > (self.limit or len(prepared.ids)) or max(prepared.ids) >= len(self.tokenizer):
            raise InvalidInputError(
                f"the text has {len(prepared.ids)} tokens up to number {max(prepared.ids)}, and the model takes "
                f"{self.limit} of {len(self.tokenizer)}"
            )
        same = {"attention_mask": 1, "token_type_ids": 0}
        ids = list(prepared.ids)
        features = {name: [same[name]] * len(ids) if name in same else ids for name in self.tokenizer.model_input_names}
        return {**features, **self.rest}


def _twin(tokenizer: Any) -> Any:
    """A Rust tokenizer that gives the same tokens from the same vocabulary, which a copy would have a second time."""
    twin = type(tokenizer)(tokenizer.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(tokenizer, name)) is not None:
            setattr(twin, name, part)
    twin.encode_special_tokens = tokenizer.encode_special_tokens
    added = tokenizer.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    # A number that was skipped can't be given again.
    return twin if twin.get_added_tokens_decoder() == added else type(tokenizer).from_str(tokenizer.to_str())


def short_way(model: Any) -> ShortWay | None:
    """The model's tokenizer alone, where that gives all that the library's own preprocessing would, on `PROBES`.

    The library also looks whether a string is a picture's address, a chat, a query to expand, and makes three tensors
    that a batch must take apart again. For a plain text model that is most of a short text's preprocessing.
    """
    try:
        expected = [model.preprocess([probe]) for probe in PROBES]
        rest = {name: value for name, value in expected[0].items() if not isinstance(value, torch.Tensor)}
        way = ShortWay(model.tokenizer, model.max_seq_length, rest)
        agrees = all(
            way(probe) == {name: _plain(value) for name, value in features.items()}
            for probe, features in zip(PROBES, expected, strict=True)
        )
    except Exception:  # whatever a model of some other kind makes of it: it takes the long way
        return None
    return way if agrees else None


def minds_task(model: Any) -> bool:
    """Whether a model treats queries and documents apart, other than by a prompt. If not, they share batches.

    A route, an adapter or a length of their own is such a way: the task reaches `forward`, or changes the features.
    """
    if "task" in model.get_model_kwargs():
        return True
    try:
        return any(
            _features(model, text, task=task) != _features(model, text)
            for text in ("A text.", "word " * (model.max_seq_length or 512))  # a short one, and one that is cut
            for task in ("query", "document")
        )
    except Exception:  # a model that takes no single texts: what it does about a task is its own business
        return True


def _features(model: Any, text: str, **task: str) -> dict[str, Any]:
    return {name: _plain(value) for name, value in model.preprocess([text], **task).items()}


def _plain(value: Any) -> Any:
    return value[0].tolist() if isinstance(value, torch.Tensor) else value
