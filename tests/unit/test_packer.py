"""The packer, against every property that its users rely on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from legit_worker.batching.costmodel import CostModel
from legit_worker.batching.packer import pack, padded

costs_lists = st.lists(st.integers(1, 512), max_size=80)
budgets = st.integers(1, 4096)


def in_arrival_order(costs: list[int], budget: int) -> list[list[int]]:
    """What a packer without sorting makes: each batch takes the next items until one more would not fit."""
    batches: list[list[int]] = []
    for index in range(len(costs)):
        longer = [*batches[-1], index] if batches else []
        if longer and padded([costs[i] for i in longer]) <= budget:
            batches[-1] = longer
        else:
            batches.append([index])
    return batches


def seconds(batches: list[list[int]], costs: list[int], model: CostModel) -> float:
    return sum(model.predict(len(batch), max(costs[i] for i in batch)) for batch in batches)


@given(costs_lists, budgets)
def test_every_item_is_in_exactly_one_batch(costs: list[int], budget: int) -> None:
    packed = pack(costs, budget, CostModel())
    assert sorted(index for batch in packed for index in batch) == list(range(len(costs)))


@given(costs_lists, budgets)
def test_no_batch_is_over_budget_unless_it_is_a_single_item(costs: list[int], budget: int) -> None:
    for batch in pack(costs, budget, CostModel()):
        assert len(batch) == 1 or padded([costs[index] for index in batch]) <= budget


@given(costs_lists, budgets)
@example([10, 1, 1], 20)
@example([3, 3, 2, 2, 1], 6)
def test_it_is_predicted_to_take_no_longer_than_arrival_order(costs: list[int], budget: int) -> None:
    model = CostModel()
    ours = seconds(pack(costs, budget, model), costs, model)
    assert ours <= seconds(in_arrival_order(costs, budget), costs, model) * (1 + 1e-9)


@given(costs_lists, budgets)
@example([2, 2, 3, 3, 1], 6)
def test_with_nothing_to_save_by_larger_batches_it_pads_no_more_than_arrival_order(
    costs: list[int], budget: int
) -> None:
    model = CostModel(np.array((0.0, 1e-4, 0.0)))  # no launch: only padding costs time
    ours = sum(padded([costs[i] for i in batch]) for batch in pack(costs, budget, model))
    assert ours <= sum(padded([costs[i] for i in batch]) for batch in in_arrival_order(costs, budget))


@given(st.lists(st.integers(1, 64), min_size=1, max_size=9), st.integers(1, 256))
def test_no_other_cut_is_faster(costs: list[int], budget: int) -> None:
    model = CostModel()

    def best(rest: tuple[int, ...]) -> float:
        if not rest:
            return 0.0
        head, *others = rest
        options = []
        for mask in range(2 ** len(others)):
            batch = [head] + [cost for bit, cost in enumerate(others) if mask >> bit & 1]
            if len(batch) > 1 and padded(batch) > budget:
                continue
            left = tuple(cost for bit, cost in enumerate(others) if not mask >> bit & 1)
            options.append(model.predict(len(batch), max(batch)) + cached(left))
        return min(options)

    memory: dict[tuple[int, ...], float] = {}

    def cached(rest: tuple[int, ...]) -> float:
        if rest not in memory:
            memory[rest] = best(rest)
        return memory[rest]

    ours = seconds(pack(costs, budget, model), costs, model)
    assert abs(ours - cached(tuple(sorted(costs)))) < 1e-9


def test_an_empty_list_makes_no_batches() -> None:
    assert pack([], 100, CostModel()) == []


@pytest.mark.parametrize("launch", [0.0, 0.5])
def test_of_equal_items_the_first_batches_are_full_and_the_last_has_the_rest(launch: float) -> None:
    model = CostModel()
    for count in (1, 2, 4, 8):
        model.observe(count, 3, launch + 0.01 * count)
    assert [len(batch) for batch in pack([3] * 70, 3 * 32, model)] == [32, 32, 6]
