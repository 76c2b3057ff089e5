"""The features of a batch, padded as the tokenizer pads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.models.features import collate

rows = st.lists(st.lists(st.integers(0, 30_000), min_size=1, max_size=9), min_size=1, max_size=5)


def tokenizer(side: str) -> Any:
    return SimpleNamespace(pad_token_id=7, pad_token_type_id=3, padding_side=side)


@given(rows, st.sampled_from(["left", "right"]), st.sampled_from(["all", "first", "none"]))
def test_lists_and_tensors_of_tokens_give_the_same_batch(ids: list[list[int]], side: str, as_lists: str) -> None:
    longest = max(map(len, ids))
    items: list[dict[str, Any]] = [
        {"input_ids": row, "attention_mask": [1] * len(row), "token_type_ids": [0] * len(row), "modality": "text"}
        for row in ids
    ]
    for item in {"all": [], "first": items[1:], "none": items}[as_lists]:
        item |= {name: torch.tensor([value]) for name, value in item.items() if isinstance(value, list)}

    def padded(row: list[int], fill: int) -> list[int]:
        more = [fill] * (longest - len(row))
        return more + row if side == "left" else row + more

    found = collate(items, tokenizer(side))
    assert found.pop("modality") == "text"
    assert {name: (value.dtype, value.tolist()) for name, value in found.items()} == {
        "input_ids": (torch.int64, [padded(row, 7) for row in ids]),
        "attention_mask": (torch.int64, [padded([1] * len(row), 0) for row in ids]),
        "token_type_ids": (torch.int64, [padded([0] * len(row), 3) for row in ids]),
    }


def test_features_that_are_no_rows_of_tokens_stay_as_they_are() -> None:
    pixels = torch.rand(1, 3, 2, 2)
    found = collate([{"pixel_values": pixels}, {"pixel_values": pixels}], tokenizer("right"))
    assert torch.equal(found["pixel_values"], torch.cat([pixels, pixels]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_without_padding_takes_rows_of_one_length(side: str) -> None:
    bare = SimpleNamespace(pad_token_id=None, pad_token_type_id=None, padding_side=side)
    assert collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}], bare)["input_ids"].tolist() == [[1, 2], [3, 4]]
