"""How large batches get, against devices whose law is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.batching.sizing import FIRST_BATCH, GROWTH, LAUNCHES, SHARED_SECONDS, Sizing

#: Seconds of a batch, which the user set.
BOUND = 0.5

Law = Callable[[int, int], float]


def run(law: Law, waiting: list[int], sizing: Sizing | None = None, longest: int = 1) -> list[int]:
    """The batches' sizes, if each time as many items wait: the largest batch runs, and is learned from."""
    sizing = sizing or Sizing(BOUND)
    sizes = []
    for items in waiting:
        sizes.append(min(items, sizing.items(longest)))
        sizing.observe(sizes[-1], longest, law(sizes[-1], longest))
    return sizes


def linear(launch: float, each: float) -> Law:
    return lambda count, longest: launch + each * count * longest


def test_of_an_untried_model_only_a_few_items_are_computed_at_first() -> None:
    assert Sizing(60.0).items(1) == FIRST_BATCH


@pytest.mark.parametrize("each", [0.1, 0.2, 1.5])
@pytest.mark.parametrize("first", [1, 8])
def test_a_slow_model_keeps_the_bound_from_its_second_batch_on(each: float, first: int) -> None:
    sizes = run(linear(0.0, each), [first] + [1000] * 100)
    assert max(sizes[1:]) <= max(2, BOUND / each)


def test_a_batch_that_took_too_long_is_followed_by_a_smaller_one() -> None:
    """Even if the fit knows better: what each item takes has nothing to do with its cost."""
    sizing = Sizing(BOUND)
    for cost in (1000, 10, 1000, 10):
        sizing.observe(1, cost, 0.2)
    tried = sizing.items(10)
    assert tried <= GROWTH
    sizing.observe(tried, 10, 0.2 * tried)
    assert sizing.items(10) <= tried / 2


@given(
    launch=st.floats(0, 5),
    each=st.floats(1e-6, 2),
    waiting=st.lists(st.integers(1, 500), min_size=1, max_size=40),
)
def test_after_the_first_batch_none_lasts_twice_as_long_as_it_may(
    launch: float, each: float, waiting: list[int]
) -> None:
    """It may last as long as the bound, as two launches, or as one item."""
    law = linear(launch, each)
    longest_allowed = max(BOUND, LAUNCHES * launch, law(1, 1))
    assert all(law(size, 1) <= 2 * longest_allowed for size in run(law, waiting)[1:])


@given(
    waiting=st.lists(st.integers(1, 500), min_size=2, max_size=40),
    seconds=st.lists(st.floats(1e-4, 10), min_size=40, max_size=40),
)
def test_no_batch_is_more_than_four_times_as_large_as_any_before_it(waiting: list[int], seconds: list[float]) -> None:
    """Whatever the batches took."""
    took = iter(seconds)
    sizes = run(lambda count, longest: next(took), waiting)
    assert all(after <= GROWTH * max(sizes[: number + 1]) for number, after in enumerate(sizes[1:]))


@pytest.mark.parametrize("first", [1, 8])
def test_a_model_that_takes_as_long_for_any_batch_is_found_out_and_gets_large_ones(first: int) -> None:
    sizes = run(linear(2.5, 0.0), [first] + [1000] * 5)
    assert max(sizes) >= 128
    assert sum(sizes[:5]) > 40


def test_a_first_batch_that_was_slow_by_itself_makes_the_next_ones_small_for_one_batch_only() -> None:
    sizing = Sizing(BOUND)
    sizing.observe(8, 20, 3.0)
    sizes = run(linear(0.004, 1e-4), [100] * 5, sizing, longest=20)
    assert sizes[0] == 1
    assert sizes[3] > 8
    assert sizes[4] > 32


def test_single_items_after_a_slow_first_one_leave_room_for_larger_batches() -> None:
    sizing = Sizing(BOUND)
    sizing.observe(1, 20, 3.0)
    sizes = run(linear(0.004, 1e-4), [1] * 6 + [100] * 4, sizing, longest=20)
    assert sizes[-1] > 32


def test_one_item_that_takes_too_long_does_not_keep_batches_of_short_ones_small() -> None:
    sizing = Sizing(BOUND)
    run(linear(0.004, 1e-4), [1000] * 5, sizing, longest=10)
    before = sizing.items(10)
    sizing.observe(1, 20_000, 2.0)
    assert sizing.items(10) == pytest.approx(before, rel=0.1)


def test_short_launches_make_short_batches() -> None:
    """A small model on a CPU: longer batches would gain next to nothing, and the next task would wait for them."""
    sizes = run(linear(0.004, 1e-4), [1000] * 8, longest=20)
    assert 0.1 < linear(0.004, 1e-4)(sizes[-1], 20) <= 0.15


def test_batches_beside_an_app_that_sends_little_are_shorter_still_but_never_shorter_than_its_own_item() -> None:
    sizing = Sizing(BOUND)
    run(linear(0.002, 0.001), [1, *[1000] * 50], sizing)
    assert sizing.items(1, light_cost=1) == pytest.approx((SHARED_SECONDS - 0.002) / 0.001, abs=1)
    assert sizing.items(1, light_cost=50) == pytest.approx(50, abs=1)
    assert sizing.items(1, light_cost=10_000) <= sizing.items(1)


def test_until_launches_are_known_all_seconds_are_the_items() -> None:
    """And the next batch is held for nothing."""
    sizing = Sizing(BOUND)
    assert sizing.surplus_seconds(cost=3 * FIRST_BATCH, longest=1) == pytest.approx(2 * BOUND), "nothing ran"
    sizing.observe(4, 1, 2.0)
    assert sizing.surplus_seconds(cost=100, longest=1) == pytest.approx(99 / 4 * 2.0)
    sizing.observe(1, 1, 2.0)
    assert sizing.surplus_seconds(cost=100, longest=1) == pytest.approx((100 / sizing.items(1) - 1) * 2.0)


def test_when_other_programs_take_the_machine_batches_are_soon_large_again() -> None:
    """From one moment on any batch takes 0.6 s, and from another on it is as it was."""
    sizing, quiet, busy = Sizing(BOUND), linear(0.004, 1e-4), linear(0.6, 2e-4)
    before = run(quiet, [1000] * 80, sizing, longest=9)[-1]
    assert max(run(busy, [1000] * 6, sizing, longest=9)[-2:]) >= before / 2
    run(busy, [1000, 50] * 40, sizing, longest=9)
    assert run(quiet, [1000, 50] * 10, sizing, longest=9)[-2] < 2 * before
