"""Outputs that share their batch's memory, once they are handed out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from plain import Plain

import legit_worker
from legit_worker.models.views import in_own_memory
from legit_worker.testing import run_together, use_models


def rows() -> np.ndarray[Any, Any]:
    return np.arange(100 * 8, dtype=np.float32).reshape(100, 8)


@pytest.mark.parametrize(
    "row", [rows()[7], torch.from_numpy(rows())[7].numpy(), torch.from_numpy(rows())[7], rows()[7][::2]]
)
def test_a_small_part_of_an_array_is_copied(row: Any) -> None:
    own = in_own_memory(row)
    assert own.tolist() == row.tolist()
    assert own.dtype == row.dtype
    assert type(own) is type(row)
    below = own.untyped_storage() if isinstance(own, torch.Tensor) else own
    assert below.nbytes() == row.nbytes if isinstance(own, torch.Tensor) else own.base is None


@pytest.mark.parametrize("output", [rows(), rows()[:60], torch.from_numpy(rows()), np.float32(3), "text", None, [1.0]])
def test_anything_else_stays_as_it_is(output: Any) -> None:
    assert in_own_memory(output) is output


@pytest.mark.parametrize("rows", [torch.eye(9).to_sparse(), torch.eye(9).to_sparse_csr()])
def test_a_row_of_a_sparse_tensor_has_no_storage_and_stays_as_it_is(rows: Any) -> None:
    row = rows[3]
    assert in_own_memory(row) is row


class Batch(np.ndarray):  # type: ignore[type-arg]
    """An array that a weak reference can watch."""


class Dense(Plain):
    """Gives rows of one array for each batch, as most models do."""

    batches: list[weakref.ref[Any]] = []  # noqa: RUF012

    def forward(self, batch: Sequence[float]) -> Any:
        """Eight times each number."""
        found = np.repeat(np.array(batch, dtype=np.float32), 8).reshape(len(batch), 8).view(Batch)
        self.batches.append(weakref.ref(found))
        return found

    def plan_encode(self, inputs: Any) -> Any:
        """One number."""
        return [inputs], lambda outputs: outputs[0]


@pytest.mark.parametrize("call", [lambda item: legit_worker.model("m").map([item])[0], lambda item: encode(item)])
def test_a_task_that_keeps_one_row_keeps_no_batch(call: Any) -> None:
    Dense.batches.clear()
    with use_models({"m": {"kind": f"{__name__}:Dense"}}):
        kept = run_together(call, range(20)).results
    gc.collect()
    assert [row.tolist() for row in kept] == [[float(number)] * 8 for number in range(20)]
    assert len(Dense.batches) < 20
    large = [one for one in Dense.batches if (batch := one()) is not None and len(batch) > 2]
    assert not large


def encode(item: float) -> Any:
    return legit_worker.model("m").encode(item)


def test_without_a_pool_a_row_keeps_no_batch_either() -> None:
    Dense.batches.clear()
    with use_models({"m": {"kind": f"{__name__}:Dense"}}):
        kept = legit_worker.model("m").map(range(20))[3]
    gc.collect()
    assert kept.tolist() == [3.0] * 8
    assert [one() for one in Dense.batches] == [None]
