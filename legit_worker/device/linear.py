"""A model's linear layers on a CPU, computed by oneDNN with weights in its own layout, if that is faster.

In: a loaded torch module. Out: the same module. If a trial on this machine shows that oneDNN is faster than torch's own
choice, it computes the module's linear layers.

Either library rearranges torch's weights for each batch. A lone text spends more time on this than on its products:
without it, MiniLM's layers take half of the time for 4 tokens, and 0.87 of it for 256 (two cores of an AMD EPYC,
`scripts/lib/linear.py`).
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeGuard

import torch

from legit_worker.device.cpu import mapped_spans, page_out
from legit_worker.errors import said

logger = logging.getLogger(__name__)

#: Rows (tokens) of the trial products: a lone title, a lone long text, and a usual batch.
TRIAL_ROWS = (4, 64, 256)

#: The most layers that a trial computes, from all over the model: too many for their weights to stay in the caches, as
#: in a real batch.
TRIAL_LAYERS = 36

#: Each side of a trial runs this many times, in turn, and its fastest run counts: other load only adds time.
TRIALS = 3

#: For some number of rows, oneDNN must be this many times as fast as torch's own choice, or the model stays as it is.
WORTH_IT = 1.1

#: For every larger number of rows it must be at least this.
NO_LOSS = 0.97

#: The rows for which the weights are rearranged. The same layout serves all others.
PACKED_FOR = 256

#: The most bytes of linear weights that are held in both layouts; and of those whose first layout is in a mapped file,
#: which the system may take from memory at any time. Other workers share that file, and not what is rearranged.
MOST_BYTES, MOST_MAPPED = 200_000_000, 400_000_000

#: How far two libraries' products may be apart, relative and absolute.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class ByOneDNN(torch.nn.Module):
    """What oneDNN needs to compute its parent, a linear layer, until the layer is moved, converted or filled anew.

    Nobody may change the layer's weights in place.
    """

    packed: torch.Tensor | None

    def __init__(self, packed: torch.Tensor | None, least_rows: int, in_file: int = 0) -> None:
        """`packed`: the weights in oneDNN's layout; None: the layer's own serve. `in_file`: as the attribute."""
        super().__init__()
        self.register_buffer("packed", packed, persistent=False)
        self.is_over = False
        #: The rows from which oneDNN is faster.
        self.least_rows = least_rows
        #: Bytes of the layer's own weights that need no memory: they are a mapped file's.
        self.in_file = in_file

    def extra_repr(self) -> str:
        """Tell modules apart: a trace is of these."""
        return f"packed={self.packed is not None}, least_rows={self.least_rows}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ByOneDNN:
        self._drop()
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._drop()

    def _drop(self) -> None:
        self.packed, self.is_over, self.in_file = None, True, 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has nothing: oneDNN's layout can't be copied."""
        return _nothing, ()


def _nothing() -> ByOneDNN:
    found = ByOneDNN(None, 0)
    found.is_over = True
    return found


def speed_up_linear_layers(model: torch.nn.Module) -> int | None:
    """Let oneDNN compute a model's linear layers on the CPU, if a trial shows that it is faster.

    The results differ by rounding only. Layers of other types than float32 and bfloat16 stay as they are. Returns the
    rows from which oneDNN computes, None if it never does.
    """
    layers = [layer for layer in model.modules() if _may_be_computed(layer)]
    if not layers:
        return None
    mapped = _in_files(layers)
    packs = sum(map(_size, layers)) <= (MOST_MAPPED if mapped == set(layers) else MOST_BYTES)
    tried = layers[:: -(-len(layers) // TRIAL_LAYERS)]
    try:
        weights = {layer: _packed(layer) if packs else layer.weight for layer in tried}
        least_rows = _decided(weights, packs=packs)
        if least_rows is None:
            return None
        packed = {layer: weights[layer] if layer in weights else _packed(layer) for layer in layers if packs}
    except (AttributeError, RuntimeError, NotImplementedError) as error:  # this torch has no oneDNN, for example
        logger.debug("oneDNN computes no linear layers: %s", said(error))
        return None
    read = _others(model, layers)
    for layer in layers:
        is_free = packs and layer in mapped and layer.weight.data_ptr() not in read
        layer.by_onednn = ByOneDNN(packed.get(layer), least_rows, in_file=_size(layer) if is_free else 0)
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
        if is_free:
            page_out(layer.weight.data_ptr(), _size(layer))
            read.add(layer.weight.data_ptr())  # another layer may have the same
    logger.debug("oneDNN computes %d linear layers for batches of %d rows or more", len(layers), least_rows)
    return least_rows


def _may_be_computed(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    return (
        type(layer) is torch.nn.Linear
        and type(layer.weight) is torch.nn.Parameter  # `weight_norm` computes it for each batch, torchao has its own
        and layer.weight.dtype in TOLERANCES
        and layer.weight.device.type == "cpu"
        and "forward" not in vars(layer)  # another library replaced it
    )


def _in_files(layers: Sequence[torch.nn.Linear]) -> set[torch.nn.Linear]:
    """Return the layers whose weights are in a mapped file."""
    spans = mapped_spans()
    return {layer for layer in layers if any(begin <= layer.weight.data_ptr() < end for begin, end in spans)}


def _others(model: torch.nn.Module, layers: Sequence[torch.nn.Linear]) -> set[int]:
    """Return where other modules' weights are: a table may be a layer's weights, too."""
    others = set(model.modules()) - set(layers)
    return {one.data_ptr() for module in others for one in module.parameters(recurse=False)}


def bytes_in_file(model: torch.nn.Module) -> int:
    """Return how many bytes of a model's weights need no memory: a file has them, and oneDNN another layout of them."""
    return sum(module.in_file for module in model.modules() if isinstance(module, ByOneDNN))


def _size(layer: torch.nn.Linear) -> int:
    return layer.weight.numel() * layer.weight.element_size()


def _packed(layer: torch.nn.Linear) -> torch.Tensor:
    with torch.inference_mode(False):  # a task may have it, and what it makes is good for nothing else
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), PACKED_FOR)
    return packed


def _forward(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:  # as torch names it
    """Compute `torch.nn.Linear.forward` by the library that is faster for this number of rows."""
    by: ByOneDNN = layer.by_onednn  # type: ignore[assignment]
    if by.is_over or input.dtype != layer.weight.dtype or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(input, layer.weight, layer.bias)
    packed, least = by.packed, by.least_rows * layer.in_features
    weight = layer.weight if packed is None else packed
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # a trace would have the way of its example for good
        found: torch.Tensor = _script()(input, layer.weight, weight, layer.bias, least)
        return found
    if input.numel() < least:
        return torch.nn.functional.linear(input, layer.weight, layer.bias)
    return _by_onednn(weight, layer.bias, input)


@functools.cache
def _script() -> Any:
    """Make the same for TorchScript. A trace of the operator itself can't take its list of numbers (torch 2.13)."""

    def by_size(
        rows: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, least: int
    ) -> torch.Tensor:
        if rows.numel() < least:
            return torch.nn.functional.linear(rows, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")  # type: ignore[no-any-return]

    return torch.jit.script(by_size)


def _by_onednn(weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Call the operator that torch's own compiler uses for linear layers on a CPU."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found


#: What trials in this process have shown, by the layers and what computes them: a gain, once seen, is not tried again.
_shown: dict[Hashable, int] = {}


def _decided(weights: Mapping[torch.nn.Linear, torch.Tensor], *, packs: bool) -> int | None:
    """Return what a trial shows, or has shown for such layers before: a model may come and go many times."""
    shapes = Counter((tuple(layer.weight.shape), layer.weight.dtype) for layer in weights)
    key = (frozenset(shapes.items()), packs, torch.get_num_threads())
    if key not in _shown:
        least_rows = _rows_worth_it(weights)
        if least_rows is None:  # which may have been other work's fault
            return None
        _shown[key] = least_rows
    return _shown[key]


def _rows_worth_it(weights: Mapping[torch.nn.Linear, torch.Tensor]) -> int | None:
    """Return the fewest of `TRIAL_ROWS` from which on oneDNN never loses; None if it gains little, or is less exact."""
    least, most_gained = None, 0.0
    for rows in reversed(TRIAL_ROWS):
        gain = _gain(weights, rows)
        if gain < NO_LOSS:
            break
        least, most_gained = rows, max(gain, most_gained)
    return least if most_gained >= WORTH_IT else None


def _gain(weights: Mapping[torch.nn.Linear, torch.Tensor], rows: int) -> float:
    """Return how many times as fast oneDNN computes these layers in a row; 0 if its results differ."""
    own = torch.Generator().manual_seed(0)  # a task may have seeded torch's own one, and draw from it meanwhile
    with torch.inference_mode():
        triples = [
            (layer, weight, torch.randn(rows, layer.in_features, generator=own).to(layer.weight.dtype))
            for layer, weight in weights.items()
        ]
        for layer, weight, x in triples:
            near = TOLERANCES[x.dtype]
            if not torch.allclose(layer(x), _by_onednn(weight, layer.bias, x), rtol=near, atol=near):
                return 0.0
        times = [
            (
                _seconds(lambda: [layer(x) for layer, _, x in triples]),
                _seconds(lambda: [_by_onednn(weight, layer.bias, x) for layer, weight, x in triples]),
            )
            for _ in range(TRIALS)
        ]
    return min(one for one, _ in times) / min(other for _, other in times)


def _seconds(products: Callable[[], object]) -> float:
    start = perf_counter()
    products()
    return perf_counter() - start
