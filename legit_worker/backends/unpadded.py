"""A transformer's batch without padding: its layers see the texts' tokens in one row, one text after another.

In: a module of transformers, and what computes it. Out: the same for a trace, in which the layers compute no padding.

All of a layer but its attention treats each token by itself. Attention runs once for all texts of one length, which
stand side by side, so it needs no mask. The table's lookup before the layers, and the pooling behind them, have the
padded batch: they take little time.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from legit_worker.errors import BackendError

#: The name by which transformers finds the attention.
NAME = "legit_worker_runs"

#: The layers' names in a model.
STACKS = ("layer", "layers")

#: What an attention is given if a token does not attend to all of its text.
LIMITS = ("is_causal", "sliding_window", "softcap", "s_aux")

#: Weights of linear layers behind the layers, as a part of the layers' weights. With more, much padding would be
#: computed.
MOST_BEHIND = 0.1

#: Computes a batch's features.
Compute = Callable[[dict[str, Any]], torch.Tensor]


def without_padding(module: torch.nn.Module, compute: Compute) -> Compute | None:
    """What computes the same rows, where torch traces it; None if `module` has no layers that are known to allow it.

    `compute` uses `module`. Whether the rows are the same is for the caller to compare: attention may depend on
    the tokens' positions. One thread may compute it, and no other code may compute with `module` meanwhile.
    """
    layers = _layers(module)
    return None if layers is None else _Unpadded(module, layers, compute)


def _layers(module: torch.nn.Module) -> Sequence[Any] | None:
    """The layers; None if they are several stacks, or much is computed behind them, or another library changed them."""
    stacks = [
        stack
        for part in module.modules()
        for name, stack in part.named_children()
        if name in STACKS
        and isinstance(stack, torch.nn.ModuleList)
        and type(part).__module__.startswith("transformers.")
    ]
    if len(stacks) != 1 or any("forward" in vars(layer) for layer in stacks[0]):  # another library has its hooks there
        return None
    inside = set(stacks[0].modules())
    behind = sum(
        part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear) and part not in inside
    )
    return list(stacks[0]) if behind <= MOST_BEHIND * sum(each.numel() for each in stacks[0].parameters()) else None


class _Unpadded:
    """Computes a module's batches without padding. It changes the module for as long as each of them takes."""

    def __init__(self, module: torch.nn.Module, layers: Sequence[Any], compute: Compute) -> None:
        self._layers, self._compute = layers, compute
        # transformers has no public name for the attention that is set.
        configs: Any = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}.values()
        self._attentions = [
            (config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")
        ]

    def __call__(self, features: dict[str, Any]) -> torch.Tensor:
        row = _Row(features["attention_mask"])
        try:
            _under_way.add(self)
            self._change(row)
            return self._compute(features)
        finally:
            try:
                self.restore()
            except BaseException:  # a signal's handler may raise anywhere, also here
                self.restore()
                raise

    def _change(self, row: _Row) -> None:
        for layer in self._layers:
            # The class's own, since the layer may have that of another batch: a signal's handler may compute one.
            forward = type(layer).forward.__get__(layer)
            layer.forward = functools.partial(
                row.layer, forward, is_first=layer is self._layers[0], is_last=layer is self._layers[-1]
            )
        for config, _ in self._attentions:
            config._attn_implementation = _attention()

    def restore(self) -> None:
        """Leave the module as it was at first, however often this is called."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        for config, attention in self._attentions:
            config._attn_implementation = attention
        _under_way.discard(self)


#: Those that have changed their module for a batch.
_under_way: set[_Unpadded] = set()


def _restore_all() -> None:
    """In a forked child, which does not have the thread that computed such a batch."""
    for each in list(_under_way):
        each.restore()


os.register_at_fork(after_in_child=_restore_all)


class _Row:
    """A batch's tokens in one row."""

    def __init__(self, mask: torch.Tensor) -> None:
        """`mask` is 1 for a token and 0 for padding, `[texts, tokens]`."""
        self._texts, self._tokens = mask.size(0), mask.size(1)
        self._places, self._runs = _order(mask)

    def layer(self, forward: Callable[..., Any], *given: Any, is_first: bool, is_last: bool, **named: Any) -> Any:
        """Compute one layer. The first one takes the padded batch, and the last one gives it."""
        arguments = inspect.signature(forward).bind(*given, **named).arguments
        arguments |= arguments.pop("kwargs", {})
        hidden = arguments.pop("hidden_states")
        if is_first:
            hidden = self._row(hidden)
        if (places := arguments.get("position_embeddings")) is not None:
            arguments["position_embeddings"] = tuple(map(self._row, places))
        found = forward(hidden, **arguments | {"attention_mask": self._runs})
        if not is_last:
            return found
        return self._batch(found) if isinstance(found, torch.Tensor) else (self._batch(found[0]), *found[1:])

    def _row(self, batch: torch.Tensor) -> torch.Tensor:
        """`[texts, tokens, width]`, or one text's that is for all, becomes `[1, all tokens, width]`."""
        every = batch.expand(self._texts, self._tokens, batch.size(-1))
        return every.flatten(0, 1).index_select(0, self._places).unsqueeze(0)

    def _batch(self, row: torch.Tensor) -> torch.Tensor:
        """The way back. Padding is zero."""
        batch = row.new_zeros(self._texts * self._tokens, row.size(-1)).index_copy(0, self._places, row.squeeze(0))
        return batch.view(self._texts, self._tokens, -1)


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
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask.ndim == 2, "this attention is for runs alone"
        if getattr(module, "is_causal", False) or any(others.get(name) for name in LIMITS):
            raise BackendError("its tokens do not attend to all of their text")
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
