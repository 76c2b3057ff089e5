"""What a loaded sentence-transformers model does with a plain text. Tries it to find out.

In: the library's object. Out: its tokenizer alone, if it gives a text the features that the library's whole
preprocessing gives; and whether the model treats queries and documents differently.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sentence_transformers.base.modules import Router

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.types import PreparedText
from legit_worker.models.preparing import LONG
from legit_worker.prep.texts import PER_TOKEN, PROBES, beginnings, fingerprint, is_word_by_word


@dataclass(frozen=True)
class ShortWay:
    """A model's tokenizer, which gives all that the library's own preprocessing gives for a plain text."""

    tokenizer: Any
    limit: int | None
    #: Features that are the same for every text.
    rest: dict[str, Any]
    #: Whether a prompt is nothing but the beginning of the text.
    takes_prompts: bool = False

    def __call__(self, text: str) -> dict[str, Any]:
        """The text's features, each a list with one number per token."""
        if self.backend is None:
            return {**self.tokenizer(text, truncation=True, max_length=self.limit), **self.rest}
        found = self._encode(text)
        of = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
        return {**{name: of[name] for name in self.tokenizer.model_input_names}, **self.rest}

    def _encode(self, text: str) -> Any:
        for start in self.beginnings(text):
            # `encode_batch` frees the interpreter lock; `encode` takes less time.
            found = self.backend.encode(start) if len(start) < LONG else self.backend.encode_batch([start])[0]
            if found.overflowing:  # the model takes no more tokens
                break
        return found

    def beginnings(self, text: str) -> Iterable[str]:
        """Beginnings of a text, then all of it. A beginning that fills the model has the tokens of the whole text."""
        if self.limit is None or len(text) < self.limit * PER_TOKEN or not self._cuts_words_apart:
            return (text,)
        return beginnings(text, self.limit)

    def reads(self, text: str) -> int:
        """Characters of a text that it reads, if the first beginning is long enough."""
        return len(next(iter(self.beginnings(text))))

    @functools.cached_property
    def _cuts_words_apart(self) -> bool:
        below = self.backend
        return below is not None and self.tokenizer.truncation_side == "right" and is_word_by_word(below)

    @functools.cached_property
    def backend(self) -> Any:
        """The Rust tokenizer below the library's, with its own settings; None if there is none.

        It takes a sixth of the time, because the library checks every option again for each text.
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
        """The fingerprint that a prepared text must have."""
        return fingerprint(lambda text: self(text)["input_ids"])

    def of_ids(self, prepared: PreparedText, limit: int | None = None) -> dict[str, Any]:
        """The features of a text that `prep_text` tokenized, of at most `limit` tokens. Raises `InvalidInputError`."""
        if not self._takes_ids:
            raise InvalidInputError("this model's tokenizer tells more than tokens: send the text without prep_text")
        limit = limit or self.limit
        if prepared.tokenizer != self.fingerprint:
            raise InvalidInputError(
                f"the text was prepared with tokenizer {prepared.tokenizer}, and this model's is {self.fingerprint}: "
                f"prepare it for the same model, and with the same version of its files"
            )
        if len(prepared.ids) > (limit or len(prepared.ids)) or max(prepared.ids) >= len(self.tokenizer):
            raise InvalidInputError(
                f"the text has {len(prepared.ids)} tokens up to number {max(prepared.ids)}, and the model takes "
                f"{limit} of {len(self.tokenizer)}"
            )
        return self._of(list(prepared.ids))

    @functools.cached_property
    def _takes_ids(self) -> bool:
        """Whether a text's tokens tell all its features. XLNet's have another type at the end."""
        return all(self._of(features["input_ids"]) == features for features in map(self, PROBES))

    def _of(self, ids: list[int]) -> dict[str, Any]:
        same = {"attention_mask": 1, "token_type_ids": 0}
        features = {name: [same[name]] * len(ids) if name in same else ids for name in self.tokenizer.model_input_names}
        return {**features, **self.rest}


def _twin(tokenizer: Any) -> Any:
    """A Rust tokenizer that gives the same tokens and shares the vocabulary. A copy would have its own."""
    twin = type(tokenizer)(tokenizer.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(tokenizer, name)) is not None:
            setattr(twin, name, part)
    twin.encode_special_tokens = tokenizer.encode_special_tokens
    added = tokenizer.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (twin.add_special_tokens if token.special else twin.add_tokens)([token])
    # If the numbers of added tokens have gaps, the twin's numbers differ: only a copy has the same.
    return twin if twin.get_added_tokens_decoder() == added else type(tokenizer).from_str(tokenizer.to_str())


def short_way(model: Any) -> ShortWay | None:
    """The model's tokenizer alone, if it gives for `PROBES` all that the library's own preprocessing gives.

    The library also checks whether a string is a picture's address, a chat, or a query to expand. It makes three
    tensors, which a batch must take apart again. For a plain text model, this is most of a short text's preprocessing.
    """
    try:
        expected = [model.preprocess([probe]) for probe in PROBES]
        rest = {name: value for name, value in expected[0].items() if not isinstance(value, torch.Tensor)}
        way = ShortWay(model.tokenizer, model.max_seq_length, rest, takes_prompts=not leaves_out_prompts(model))
        agrees = all(
            way(probe) == {name: _plain(value) for name, value in features.items()}
            for probe, features in zip(PROBES, expected, strict=True)
        )
    except Exception:  # a model of another kind can't take a plain text: it takes the long way
        return None
    return (way if _agrees_with_prompts(way, model) else replace(way, takes_prompts=False)) if agrees else None


def _agrees_with_prompts(way: ShortWay, model: Any) -> bool:
    """Whether a prompt changes a text's features as the same words in the text do."""
    prompts = {"Find: ", *filter(None, model.prompts.values())}
    try:
        return way.takes_prompts and all(
            way(prompt + probe) == without_prompt_length(_features(model, probe, prompt=prompt))
            for prompt in prompts
            for probe in PROBES
        )
    except Exception:
        return False


def leaves_out_prompts(model: Any) -> bool:
    """Whether the model's pooling leaves out the prompt, and so must know its length."""
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())


def without_prompt_length(features: dict[str, Any]) -> dict[str, Any]:
    """The features without what only such a pooling needs."""
    return {name: value for name, value in features.items() if name != "prompt_length"}


def minds_task(model: Any) -> bool:
    """Whether a model treats queries and documents differently, beside the prompt. If not, they share batches.

    It does if they have a route, an adapter or a length of their own: the task reaches `forward`, or changes features.
    """
    if "task" in model.get_model_kwargs():
        return True
    try:
        return any(
            _features(model, text, task=task) != _features(model, text)
            for text in ("A text.", "word " * (model.max_seq_length or 512))  # a short one, and one that is cut
            for task in ("query", "document")
        )
    except Exception:  # the model takes no single texts: nobody knows what it does with a task
        return True


def has_several_tokenizers(model: Any) -> bool:
    """Whether the model's routes pad differently. Only the library knows which route an input takes."""
    routes = model[0].sub_modules.values() if isinstance(model[0], Router) else ()
    return len({id(getattr(route[0], "tokenizer", None)) for route in routes}) > 1


def _features(model: Any, text: str, **options: str) -> dict[str, Any]:
    return {name: _plain(value) for name, value in model.preprocess([text], **options).items()}


def _plain(value: Any) -> Any:
    return value[0].tolist() if isinstance(value, torch.Tensor) else value
