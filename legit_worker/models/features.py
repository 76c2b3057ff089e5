"""What a batch needs of one input, and how a batch's inputs are joined.

In: what sentence-transformers' preprocessing gives for one input. Out: its cost, the key that says which inputs may
share a batch, and the batch's features, padded together.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import util
from torch.nn.utils.rnn import pad_sequence

from legit_worker.errors import InvalidInputError
from legit_worker.inputs.texts import check_unicode
from legit_worker.inputs.types import ImageBytes, Text
from legit_worker.models.finite import check_finite

#: Numbers of an image or a sound that count as one unit of cost, if the model does not say how large its patches are.
NUMBERS_PER_COST = 1024

#: The tensors of a text's features.
TOKENS = {"input_ids", "attention_mask", "token_type_ids"}


@dataclass(frozen=True, slots=True)
class Prompted:
    """An input, with the prompt that the library puts before it."""

    input: Any
    prompt: str | None
    #: `query`, `document`, or another task that the model treats in its own way.
    task: str | None = None
    #: The most tokens that are read; None is the model's own limit.
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """One input's features, or the input itself if its features can't be padded."""

    #: Lists of token ids, or tensors with a first dimension of 1. Any other value is the same for the whole batch.
    features: dict[str, Any]
    cost: int
    key: Hashable
    task: str | None = None
    raw: Prompted | None = None


def check_text(value: Any) -> None:
    """Raise `InvalidInputError` if `value` is not text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidInputError(f"expected text, got {what(value)}")
    if type(value) is not Text:
        check_unicode(value)


def what(value: Any) -> str:
    """A value's type and its beginning, for an error."""
    if isinstance(value, ImageBytes):
        return "an image"
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def characters(value: Any) -> int:
    """Of all texts in an input: a text, a pair of texts, or a dict that has one."""
    match value:
        case str():
            return len(value)
        case {"text": text}:
            return characters(text)
        case list() | tuple():
            return sum(map(characters, value))
    return 0


def can_be_padded(features: dict[str, Any]) -> bool:
    """Whether the library gave one row per input. Static embeddings and unpadded flash attention have no rows."""
    tensors = [value for value in features.values() if isinstance(value, torch.Tensor)]
    return bool(tensors) and all(tensor.ndim >= 2 and tensor.shape[0] == 1 for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Patches:
    """What a model cuts an image into."""

    #: Numbers of each.
    numbers: int = NUMBERS_PER_COST
    #: Whether the tokens of an input have one for each patch, so that patches need not be counted.
    are_tokens: bool = False


def patches_of(config: Any) -> Patches:
    """What a model's configuration says of patches; squares in two of three dimensions, for each colour."""
    vision = getattr(config, "vision_config", None) or config
    side, colours = getattr(vision, "patch_size", None), getattr(vision, "num_channels", None)
    numbers = side * side * (colours or 3) if isinstance(side, int) and side > 0 else NUMBERS_PER_COST
    names = ("image_token_id", "image_token_index")
    return Patches(numbers, any(getattr(config, name, None) is not None for name in names))


def cost_of(features: dict[str, Any], patches: Patches) -> int:
    """Tokens of a text, patches of an image, and both of an input of both; for anything else, its largest tensor."""
    tensors = [value for value in features.values() if isinstance(value, torch.Tensor)]
    if "input_ids" not in features:
        return max(1, max((tensor.numel() for tensor in tensors), default=0) // patches.numbers)
    ids = features["input_ids"]
    tokens = int(ids.shape[1]) if ids.ndim > 1 else ids.numel()
    pixels = max((tensor.numel() for tensor in tensors if tensor.is_floating_point()), default=0)
    return max(1, tokens if patches.are_tokens else tokens + pixels // patches.numbers)


def key_of(features: dict[str, Any]) -> Hashable:
    """All that must be equal in a batch: padding makes only the lengths of sequences equal."""
    length = int(features["input_ids"].shape[1]) if "input_ids" in features else None
    return tuple(
        (name, tuple(value.shape[1:] if value.shape[1] != length else value.shape[2:]))
        if isinstance(value, torch.Tensor)
        else (name, str(value))
        for name, value in sorted(features.items())
    )


def identity_of(features: dict[str, Any]) -> Hashable:
    """A text's tokens, with all that depends on them; None for other inputs. What is no sequence is in `key_of`."""
    if isinstance(ids := features.get("input_ids"), list):  # from the short way: the others depend on these
        return tuple(ids)
    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    if ids is None or not tensors.keys() <= TOKENS:
        return None
    return tuple(tuple(value.flatten().tolist()) for _, value in sorted(tensors.items()))


def is_tokens(features: Mapping[str, Any]) -> bool:
    """Whether an input has tokens, and no pixels or other tensors."""
    return "input_ids" in features and all(
        name in TOKENS for name, value in features.items() if isinstance(value, list | torch.Tensor)
    )


def as_lists(features: Mapping[str, Any]) -> dict[str, Any]:
    """One input's features, with lists of tokens in place of tensors."""
    return {name: value[0].tolist() if isinstance(value, torch.Tensor) else value for name, value in features.items()}


def collate(items: Sequence[Mapping[str, Any]], tokenizer: Any, length: int = 0) -> dict[str, Any]:
    """The features of a batch, padded as the tokenizer pads. Features that are lists are padded to this length, too."""
    return {name: _join(name, [item[name] for item in items], tokenizer, length) for name in items[0]}


def _join(name: str, values: list[Any], tokenizer: Any, length: int) -> Any:
    """One feature of all items as one tensor, or the value that is the same in each."""
    if not isinstance(values[0], list | torch.Tensor):
        return values[0]
    if all(isinstance(ids, list) for ids in values):
        return _padded(values, _fill(name, tokenizer), length, at_end=tokenizer.padding_side == "right")
    values = [torch.tensor([ids]) if isinstance(ids, list) else ids for ids in values]
    if all(tensor.shape[1] == values[0].shape[1] for tensor in values):
        return torch.cat(values)
    rows = [tensor[0] for tensor in values]
    fill = _fill(name, tokenizer)
    return pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=tokenizer.padding_side)


def _fill(name: str, tokenizer: Any) -> int:
    """What a feature is padded with. Asked only if there is padding: not every tokenizer knows of it."""
    fill: int = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}.get(name, 0)
    return fill


def _padded(rows: list[list[int]], fill: int, length: int, *, at_end: bool) -> torch.Tensor:
    """One array for all rows: a tensor for each of them takes a hundred times as long."""
    longest = max(length, *map(len, rows))
    numbers = np.full((len(rows), longest), fill or 0, dtype=np.int64)  # without padding, all have one length
    for place, row in zip(numbers, rows, strict=True):
        place[slice(len(row)) if at_end else slice(longest - len(row), None)] = row
    return torch.from_numpy(numbers)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's numbers. bfloat16, which numpy lacks, becomes float32, as in the library."""
    values: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values


def dense_rows(rows: Sequence[NDArray[Any]], dimension: int | None, *, normalize: bool, precision: str | None) -> Any:
    """The rows of a call as one array, as the library's `encode` finishes them; `[]` if there are none.

    Raises `InvalidInputError` for a row that is not finite, if a precision would make a plausible one of it.
    """
    if not rows:
        return np.array([])
    vectors: Any = np.stack(rows)[:, :dimension]
    if normalize:
        # In float16, the squares of a norm of 256 are infinite.
        wide = vectors.astype(np.promote_types(vectors.dtype, np.float32), copy=False)
        vectors = (wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)).astype(vectors.dtype)
    if precision and precision != "float32":
        check_finite(vectors, is_list=len(rows) > 1)
        vectors = util.quantize_embeddings(vectors, precision=precision)
    return vectors


def largest(places: NDArray[np.int64], values: NDArray[Any], most: int | None) -> tuple[Any, Any]:
    """A sparse row's `most` largest values and their places; all of them if `most` is None."""
    if most is None or len(values) <= most:
        return places, values
    kept = np.sort(np.argpartition(np.abs(values), -most)[-most:])
    return places[kept], values[kept]


def sparse_rows(rows: Sequence[tuple[Any, Any]], width: int | None) -> Any:
    """A `scipy.sparse.csr_array` with one row for each pair of places and values."""
    from scipy.sparse import csr_array

    starts = np.cumsum([0, *(len(places) for places, _ in rows)])
    places = np.concatenate([places for places, _ in rows]) if rows else np.array([], dtype=np.int64)
    values = np.concatenate([values for _, values in rows]) if rows else np.array([], dtype=np.float32)
    return csr_array((values, places, starts), shape=(len(rows), width))


def as_the_library_takes_them(embeddings: Any) -> Any:
    """Sparse rows, as `encode` gives them, become a sparse tensor. Anything else stays as it is."""
    from scipy.sparse import issparse, vstack

    if isinstance(embeddings, list) and any(map(issparse, embeddings)):
        embeddings = vstack(embeddings)
    if not issparse(embeddings):
        return embeddings
    found = embeddings.tocoo()
    places = torch.from_numpy(np.stack((found.row, found.col)))
    return torch.sparse_coo_tensor(places, torch.from_numpy(found.data), found.shape, check_invariants=True)
