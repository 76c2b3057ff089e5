"""A transformer's batch without padding: its layers see the texts' tokens in one row, one text after another.

In: a module of transformers, and what computes it. Out: the same for a trace, in which the layers compute no padding.

All of a layer but its attention treats each token by itself. Attention runs once for all texts of one length, which
stand side by side, so it needs no mask. The table's lookup before the layers, and the pooling behind them, have the
padded batch: they take little time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

#: The name by which transformers finds the attention.
NAME = "legit_worker_runs"

#: Weights of linear layers behind the layers, as a part of the layers' weights: more would compute much padding.
MOST_BEHIND = 0.1

#: Computes a batch's features.
Compute = Callable[[dict[str, Any]], torch.Tensor]


def without_padding(module: torch.nn.Module, compute: Compute) -> Compute | None:
    """What computes the same rows, where torch traces it; None if `module` has no layers that are known to allow it.

    `compute` uses `module`. Whether the rows are the same is for the caller to compare: an attention may know where its
    tokens stand. One thread may compute it, and no other code may compute with `module` meanwhile.
    """
    layers = _layers(module)
    return None if layers is None else functools.partial(_compute, layers, compute)


def _layers(module: torch.nn.Module) -> Any:
    """The part that has all layers; None if there are several such parts, or much is computed behind them."""
    found = [
        part
        for part in module.modules()
        if isinstance(getattr(part, "layer", None), torch.nn.ModuleList) and hasattr(part, "config")
    ]
    if len(found) != 1 or not type(found[0]).__module__.startswith("transformers."):
        return None
    inside = set(found[0].modules())
    behind = sum(
        part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear) and part not in inside
    )
    return found[0] if behind <= MOST_BEHIND * sum(weight.numel() for weight in found[0].parameters()) else None


def _compute(layers: Any, compute: Compute, features: dict[str, Any]) -> torch.Tensor:
    places, runs = _order(features["attention_mask"])
    forward, config = layers.forward, layers.config
    attention = config._attn_implementation  # transformers has no other name for what is set

    def unpadded(hidden: torch.Tensor, *_: Any, **options: Any) -> Any:
        count, longest, width = hidden.size(0), hidden.size(1), hidden.size(2)
        options["attention_mask"] = runs  # which all layers hand on to the attention
        found = forward(hidden.flatten(0, 1).index_select(0, places).unsqueeze(0), **options)
        rows = hidden.new_zeros(count * longest, width).index_copy(0, places, found.last_hidden_state.squeeze(0))
        found.last_hidden_state = rows.view(count, longest, width)
        return found

    layers.forward = unpadded
    try:
        config._attn_implementation = _attention()
        return compute(features)
    finally:
        config._attn_implementation = attention
        del layers.forward


def _order(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in a padded batch each token stands, text by text from the shortest one; and the runs of equal lengths.

    `mask` is 1 for a token and 0 for padding, `[texts, tokens]`. A run is how many texts are as long, and their length.
    """
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    every = order.unsqueeze(1) * mask.size(1) + torch.arange(mask.size(1), device=mask.device)
    places = every.masked_select(mask.index_select(0, order) != 0)
    length, count = torch.unique_consecutive(lengths.index_select(0, order), return_counts=True)
    return places, torch.stack((count, length), 1)


@functools.cache
def _attention() -> str:
    """The attention's name. Made at the first use: a trace has a loop only if TorchScript has compiled it."""
    from transformers import AttentionInterface

    attend = torch.jit.script(_attend)

    def of_runs(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        scale = query.size(-1) ** -0.5 if scaling is None else float(scaling)
        return attend(query, key, value, attention_mask, scale), None

    AttentionInterface.register(NAME, of_runs)
    return NAME


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: torch.Tensor, scale: float
) -> torch.Tensor:
    """The attention of each text's tokens to each other.

    In: `[1, heads, tokens, width]` each. Out: `[1, tokens, heads, width]`.
    """
    queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    heads, width = queries.size(1), queries.size(2)
    rows = torch.empty_like(queries)
    begin = 0
    for run in range(runs.size(0)):
        count, length = int(runs[run, 0]), int(runs[run, 1])
        end = begin + count * length
        found = torch.nn.functional.scaled_dot_product_attention(
            queries[begin:end].view(count, length, heads, width).transpose(1, 2),
            keys[begin:end].view(count, length, heads, width).transpose(1, 2),
            values[begin:end].view(count, length, heads, width).transpose(1, 2),
            None,
            0.0,
            False,
            scale=scale,
        )
        rows[begin:end] = found.transpose(1, 2).reshape(count * length, heads, width)
        begin = end
    return rows.unsqueeze(0)
