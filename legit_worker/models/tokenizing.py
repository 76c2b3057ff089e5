"""Texts and other inputs as features, by a loaded sentence-transformers model.

In: the library's object, and one call's inputs with their prompts. Out: the features that the library gives, by the
shortest way that gives the same.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from cachetools import LRUCache

from legit_worker.errors import InvalidInputError, shown
from legit_worker.inputs.types import PreparedText
from legit_worker.models.features import Prompted, characters, check_text
from legit_worker.models.lengths import Lengths
from legit_worker.models.modalities import AsText
from legit_worker.models.preparing import Aside
from legit_worker.models.shortway import (
    ShortWay,
    has_several_tokenizers,
    leaves_out_prompts,
    minds_task,
    short_way,
    without_prompt_length,
)

#: The most limits whose tokenizer is kept: more than a model has aliases. Each call may name another limit, and some
#: tokenizers take megabytes.
KNOWN_LIMITS = 32


#: The fewest tokens that a tokenizer has beside its special ones. If its files are missing, transformers makes an empty
#: one, which has two at most, such as the sign of a word's beginning. DNA has four letters.
FEWEST = 3


class Tokenizing:
    """One model's. Used by one thread at a time: tokenizers keep state."""

    def __init__(self, model: Any) -> None:
        """`model`: the library's object. A few texts are tried with it."""
        self._model = model
        self._as_text = AsText(model)
        self._tokenize = short_way(model)
        self._ways: LRUCache[int, ShortWay] = LRUCache(KNOWN_LIMITS)
        self._aside = Aside()
        self._lengths = Lengths(model)
        #: The most tokens that the model reads; None if there is no limit.
        self.limit: int | None = model.max_seq_length
        #: Whether it treats queries and documents apart, beside the prompt.
        self.minds_task = minds_task(model)
        #: Whether its routes pad differently, so that `forward` must tokenize.
        self.has_several = has_several_tokenizers(model)
        self._leaves_out_prompts = leaves_out_prompts(model)

    def check_limit(self, limit: int | None) -> None:
        """Raise `LimitError` if the model can't read texts up to this limit; None is its own."""
        if limit is not None:
            self._lengths.check(limit)

    def by_short_way(self, one: Prompted) -> dict[str, Any] | None:
        """The features of a plain text; None if only the library itself knows them."""
        way = self._way(one.limit)
        if way is None or not isinstance(one.input, str) or one.task or (one.prompt and not way.takes_prompts):
            return None
        text = (one.prompt or "") + one.input
        features: dict[str, Any] = self._aside.run(functools.partial(way, text), way.reads(text))
        return features

    def _way(self, limit: int | None) -> ShortWay | None:
        """The short way of a text that is read up to this limit."""
        if self._tokenize is None or limit is None or limit == self.limit:
            return self._tokenize
        way = self._ways.get(limit)
        if way is None:
            way = self._ways[limit] = replace(self._tokenize, limit=limit)
        return way

    def by_the_library(self, one: Prompted) -> dict[str, Any]:
        """The input's features, as the library gives them. Reads a long text only as far as it changes them."""
        way = self._way(one.limit) if isinstance(one.input, str) and not one.task else None
        for start in (one.input,) if way is None else way.beginnings(one.input):
            read = functools.partial(self.features_of, [start], one.prompt, one.task, one.limit)
            # `forward` uses several tokenizers, too, and would wait.
            features = self._aside.run(read, 0 if self.has_several else characters(start))
            if way is not None and len(features["input_ids"][0]) == way.limit:
                break
        return features

    def of_batch(
        self, inputs: list[Any], prompt: str | None, task: str | None, limit: int | None = None
    ) -> dict[str, Any]:
        """The same as `features_of`, once no long text is read on another thread: tokenizers keep state."""
        with self._aside.turn():
            return self.features_of(inputs, prompt, task, limit)

    def features_of(
        self, inputs: list[Any], prompt: str | None, task: str | None, limit: int | None = None
    ) -> dict[str, Any]:
        """What the library gives for inputs, padded together."""
        with self._lengths.limited(limit):
            features = self._model.preprocess(list(map(self._as_text, inputs)), prompt=prompt, **if_any(task))
        return dict(features) if self._leaves_out_prompts else without_prompt_length(features)

    def of_ids(self, prepared: PreparedText, prompted: Prompted) -> dict[str, Any]:
        """The features of a result of `prep_text`. Raises `InvalidInputError` if the text itself would have others."""
        if self._tokenize is None or prompted.task or (prepared.prompt and not self._tokenize.takes_prompts):
            raise InvalidInputError(
                "this model, its prompt or its task needs the text itself: send it without prep_text"
            )
        if (prepared.prompt or "") != (prompted.prompt or ""):
            raise InvalidInputError(
                f"the text was prepared with the prompt {shown(prepared.prompt or '')}, and the prompt here is "
                f"{shown(prompted.prompt or '')}: give prep_text and embed_text the same one"
            )
        return self._tokenize.of_ids(prepared, prompted.limit)

    def check_length(self, item: Prompted) -> None:
        """Raise `InvalidInputError`, with both numbers, if the model would cut the text."""
        text = item.input
        if isinstance(text, PreparedText):
            if text.cut:
                raise InvalidInputError("the text was cut by prep_text: split it with chunk_tokens")
            return
        check_text(text)
        own = getattr(self._model[0], f"{item.task}_length", None)
        limit = own or item.limit or self.limit
        tokenizer = self._model.tokenizer
        if limit is None or tokenizer is None:
            return
        text = (item.prompt or "") + text
        way = self._way(limit)
        for start in (text,) if way is None else way.beginnings(text):
            count = functools.partial(tokenizer, start, truncation=False, verbose=False)
            length = len(self._aside.run(count, len(start))["input_ids"])
            if length > limit:
                raise InvalidInputError(
                    f"the text has {length if start == text else f'over {length}'} tokens and the model takes {limit}: "
                    f"shorten it, split it, or pass truncate=True to embed its first {limit}"
                )


def check_vocabulary(tokenizer: Any) -> None:
    """Raise `FileNotFoundError` if one of transformers' tokenizers knows no words: all texts would be alike."""
    special = getattr(tokenizer, "all_special_ids", None)
    if special is not None and len(tokenizer) - len(set(special)) < FEWEST:
        raise FileNotFoundError(
            f"its tokenizer has {len(tokenizer)} tokens, and no words: the folder lacks the tokenizer's files, such as "
            "tokenizer.json"
        )


def if_any(task: str | None) -> dict[str, str]:
    """The library's argument: modules that know no task are not given one."""
    return {} if task is None else {"task": task}
