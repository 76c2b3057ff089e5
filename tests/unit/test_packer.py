"""The packer, against every property that its users rely on."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from legit_worker.batching.costmodel import CostModel
from legit_worker.batching.packer import SPREAD, evened, fill, pack, padded, pick

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


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), budgets)
@example([3, 1, 1, 1, 9], 6)
@example([2, 2, 2, 2, 2], 6)
def test_the_picked_batch_has_the_first_item_and_is_within_the_budget(costs: list[int], budget: int) -> None:
    batch = pick(costs, budget, CostModel())
    assert 0 in batch
    assert len(set(batch)) == len(batch)
    assert len(batch) == 1 or padded([costs[index] for index in batch]) <= budget


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), budgets)
def test_no_batch_of_neighbours_in_length_does_more_in_its_time(costs: list[int], budget: int) -> None:
    model = CostModel(np.array((1.0, 1.2e-4, 1e-8)))  # two batches always take longer than one

    def seconds_per_cost(batch: list[int]) -> float:
        return model.predict(len(batch), max(batch)) / sum(batch)

    order = sorted(range(len(costs)), key=costs.__getitem__)
    lengths, place = [costs[index] for index in order], order.index(0)
    runs = [lengths[start:end] for start in range(place + 1) for end in range(place + 1, len(order) + 1)]
    best = min(seconds_per_cost(run) for run in runs if len(run) == 1 or padded(run) <= budget)
    assert seconds_per_cost([costs[index] for index in pick(costs, budget, model)]) <= best * (1 + 1e-9)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=40), budgets)
def test_no_two_batches_take_less_time_than_the_picked_one(costs: list[int], budget: int) -> None:
    model = CostModel()
    batch = sorted(costs[index] for index in pick(costs, budget, model))
    for cut in range(1, len(batch)):
        parts = [batch[:cut], batch[cut:]]
        assert sum(model.predict(len(part), max(part)) for part in parts) >= model.predict(len(batch), max(batch))


def test_a_short_item_does_not_ride_with_long_ones_that_are_a_good_batch_by_themselves() -> None:
    assert pick([3, *[300] * 20, 3], 2400, CostModel()) == [0, 21]
    assert pick([300, *[3] * 20], 2400, CostModel()) == [0]


def test_a_queue_that_is_filled_again_wastes_little() -> None:
    """Lengths as those of mixed texts, and the launch of a small transformer on a CPU."""
    draw = random.Random(20)
    model = CostModel(np.array((5e-3, 8e-5, 1e-8)))
    waiting, real, computed = [], 0, 0
    for _ in range(300):
        while len(waiting) < 512:
            waiting.append(min(256, round(draw.lognormvariate(4.26, 0.6)) + 2))
        batch = pick(waiting, 1800, model)
        costs = [waiting[index] for index in batch]
        real, computed = real + sum(costs), computed + padded(costs)
        waiting = [cost for index, cost in enumerate(waiting) if index not in set(batch)]
    assert 1 - real / computed < 0.03


def test_to_pick_looks_at_few_runs_even_if_all_items_are_of_one_length_or_none_are() -> None:
    class Counting(CostModel):
        looked_at = 0

        def predict(self, count: Any, longest: Any) -> Any:
            self.looked_at = max(self.looked_at, np.size(count))
            return super().predict(count, longest)

    for costs in ([3] * 1024, list(range(1, 1025)), list(range(1024, 0, -1)), [500, *range(1, 1024)]):
        model = Counting()
        pick(costs, 16_384, model)
        assert model.looked_at < 20_000


@given(st.lists(st.integers(1, 512), min_size=1, max_size=80), budgets)
def test_a_batch_without_padding_has_the_first_item_and_those_that_fit_in_their_order(
    costs: list[int], budget: int
) -> None:
    chosen = fill(costs, budget)
    taken = [costs[index] for index in chosen]
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 1 or sum(taken) <= budget
    assert padded(taken) <= SPREAD * sum(taken)
    for index in set(range(len(costs))) - set(chosen):  # each was left for a reason
        before = [costs[place] for place in chosen if place < index]
        more = [*before, costs[index]]
        assert sum(before) >= budget or sum(more) > budget or padded(more) > SPREAD * sum(more)


def test_a_batch_without_padding_has_no_long_item_among_many_short_ones() -> None:
    assert fill([5, 4, 6, 500, 5, 7], 10_000) == [0, 1, 2, 4, 5]
    assert fill([500, 5, 4, 6, 5, 450], 10_000) == [0, 1, 2, 5]
    assert fill([9, 9, 9, 9], 20) == [0, 1]
    assert fill([90, 1], 20) == [0]


@given(st.lists(st.integers(1, 512), min_size=1, max_size=80))
def test_equal_items_stand_for_those_of_a_batch_without_padding(costs: list[int]) -> None:
    count, longest = evened(costs)
    assert count * longest == pytest.approx(sum(costs))
    assert count * longest**2 == pytest.approx(sum(cost * cost for cost in costs))
    assert count <= len(costs) + 1e-9
    assert min(costs) <= longest + 1e-9
