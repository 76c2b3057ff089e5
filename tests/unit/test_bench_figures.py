"""What figures of the benchmark are: ratios within a round, percentiles, targets, and the times of a random load."""

from __future__ import annotations

import importlib
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "lib"))
figures: Any = importlib.import_module("bench_figures")

POSITIVE = some.floats(min_value=1e-3, max_value=1e6)


def table(ours: list[float], stock: list[float]) -> Any:
    """Both sides' values, one per round."""
    rows = [figures.Row(name=name, values=values) for name, values in (("legit_worker", ours), ("stock solo", stock))]
    return figures.Table(name="short", title="a title", unit="texts/s", rows=rows, references=("stock solo", "none"))


def test_a_ratio_is_of_two_values_of_one_round() -> None:
    """The machine was half as fast in the second round. The ratio of both medians would say 2.33."""
    found = table(ours=[400, 200, 350], stock=[200, 100, 150])
    spread = found.ratio(found.row("legit_worker"), "stock solo")
    assert (spread.low, spread.median) == (2, 2)
    assert spread.high == pytest.approx(7 / 3)


def test_rounds_of_different_number_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        figures.ratios([1, 2], [1])


def test_a_reference_that_was_not_measured_has_no_ratio() -> None:
    found = table(ours=[400], stock=[200])
    assert found.ratio(found.row("legit_worker"), "none") is None
    assert list(found.to_json()["rows"][0]["ratios"]) == ["stock solo"]


@given(some.lists(POSITIVE, min_size=1))
def test_a_spread_holds_its_median(values: list[float]) -> None:
    spread = figures.Spread.of(values)
    assert spread.low <= spread.median <= spread.high


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [figures.percentile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [1, 50, 95, 99, 100]
    assert figures.percentile([7.0], 0.99) == 7


@given(some.lists(POSITIVE, min_size=1), some.floats(min_value=0, max_value=1))
def test_at_least_its_share_of_the_values_is_no_greater_than_a_percentile(values: list[float], share: float) -> None:
    found = figures.percentile(values, share)
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_targets_are_judged_by_the_median_of_the_ratios() -> None:
    found = table(ours=[1300, 590, 1300], stock=[200, 100, 200])
    (verdict,) = found.judge()
    assert verdict.reached
    assert "6.50 times stock solo" in verdict.told
    assert not figures.Target(table="short", name="a", reference="b", bound=1, at_most=True).judge(1.01).reached


def test_a_random_load_is_the_same_for_one_seed_and_another_for_the_next() -> None:
    assert figures.poisson_times(100, 50, seed=1) == figures.poisson_times(100, 50, seed=1)
    assert figures.poisson_times(100, 50, seed=1) != figures.poisson_times(100, 50, seed=2)


def test_a_random_load_has_its_rate_and_gaps_of_a_poisson_process() -> None:
    """The gaps of a Poisson process are spread as widely as they are long."""
    times = figures.poisson_times(200, 20_000, seed=3)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == 20_000
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 200, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 200, rel=0.05)
