"""How many tokens of a text the library reads, if it is to read fewer than the model does.

In: the library's object, a limit. Out: the same object with this limit for a moment, or why it can't have the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.base.modules import Router

from legit_worker.errors import LimitError

#: What configurations call the number of their positions.
SIZES = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")


class Lengths:
    """One model's."""

    def __init__(self, model: Any) -> None:
        self._routes = routes(model)
        # The largest limit that was checked: each smaller one is as good.
        self._fine = 0

    def check(self, limit: int) -> None:
        """Raise `LimitError` if a route has no limit to set, or has fewer positions than this."""
        if limit <= self._fine:
            return
        for route in self._routes:
            if not _can_be_limited(route):
                raise LimitError(
                    f"its module {type(route).__name__} reads each text to its end: leave MAX_SEQ_LENGTH out"
                )
            if (most := positions(route)) is not None and limit > most:
                raise LimitError(f"it has {most} positions: ask for at most {most} tokens")
        self._fine = limit

    @contextmanager
    def limited(self, limit: int | None) -> Iterator[None]:
        """Have the library read this many tokens of each text. Used by one thread at a time.

        A router tells the largest limit of its routes, and sets all: so each route's own is kept.
        """
        if limit is None:
            yield
            return
        before = [(route, route.max_seq_length, _prompt_lengths(route)) for route in self._routes]
        try:
            for route, _, known in before:
                route.max_seq_length = limit
                if known is not None:
                    route._prompt_length_mapping = {}  # a prompt that is cut has another length
            yield
        finally:
            for route, own, known in before:
                route.max_seq_length = own
                if known is not None:
                    route._prompt_length_mapping = known


def routes(model: Any) -> list[Any]:
    """The modules that read inputs: the first of each route, or the model's first."""
    first = model[0]
    return [route[0] for route in first.sub_modules.values()] if isinstance(first, Router) else [first]


def config_of(route: Any) -> Any:
    """The configuration of a route's model in transformers; None if it has none."""
    return getattr(getattr(route, "model", None), "config", None)


def positions(route: Any) -> int | None:
    """The most tokens for which a module has learned positions; None if it has no table, as with rotary ones."""
    config = config_of(route)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = {getattr(text, name, None) for name in SIZES}
    tables = (
        table
        for name, table in route.named_modules()
        if isinstance(table, torch.nn.Embedding) and ("position" in name or name.endswith("wpe"))
    )
    rooms = [
        table.num_embeddings - _first(table)
        for table in tables
        if {table.num_embeddings, table.num_embeddings - _first(table)} & known
    ]
    return min(rooms, default=None)


def _first(table: torch.nn.Embedding) -> int:
    """The row of a text's first token. BART and OPT have an offset; RoBERTa counts from behind the padding's number."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _can_be_limited(route: Any) -> bool:
    own = getattr(type(route), "max_seq_length", None)
    return own.fset is not None if isinstance(own, property) else hasattr(route, "max_seq_length")


def _prompt_lengths(route: Any) -> dict[Any, Any] | None:
    """What the library's module remembers of prompts, by the tokens that it reads of them."""
    known: dict[Any, Any] | None = getattr(route, "_prompt_length_mapping", None)
    return known
