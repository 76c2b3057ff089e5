"""Whatever is wrong with an answer is found, and its row named; rounding is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.golden import texts
from legit_worker.validation.comparison import Failed, Tolerance, compare

ROWS, DIMENSION = 12, 8
REFERENCE = np.random.default_rng(0).normal(size=(ROWS, DIMENSION)).tolist()
rows = st.integers(0, ROWS - 1)


def compared(changes: dict[int, Any]) -> Any:
    return compare(REFERENCE, dict(enumerate(REFERENCE)) | changes, Tolerance())


def wrong(changes: dict[int, Any]) -> dict[int, str]:
    """By row, from 1."""
    return {finding.row: finding.problem for finding in compared(changes).findings}


def test_rounding_is_no_difference() -> None:
    result = compare(REFERENCE, dict(enumerate(np.float32(REFERENCE).tolist())), Tolerance())
    assert result.findings == ()
    assert (result.compared, result.in_order) == (ROWS, True)
    assert 0 < result.max_difference < 1e-6  # type: ignore[operator]


@given(rows, rows)
def test_swapped_rows_name_each_other(one: int, other: int) -> None:
    result = compared({one: REFERENCE[other], other: REFERENCE[one]})
    found = {finding.row: finding.problem for finding in result.findings}
    assert set(found) == ({one + 1, other + 1} if one != other else set())
    assert result.in_order == (one == other)
    if one != other:
        assert f"row {other + 1}" in found[one + 1]


@given(rows, st.sampled_from([0.9, 1.1, 2.0]))
def test_a_scaled_vector_is_found_though_its_cosine_is_1(row: int, factor: float) -> None:
    result = compared({row: [factor * number for number in REFERENCE[row]]})
    (finding,) = result.findings
    assert finding.row == row + 1
    assert finding.cosine == pytest.approx(1)
    assert "length" in finding.problem


@given(rows, st.integers(0, DIMENSION - 1), st.sampled_from([math.nan, math.inf]))
def test_a_number_that_is_not_finite_is_found(row: int, place: int, number: float) -> None:
    vector = list(REFERENCE[row])
    vector[place] = number
    assert wrong({row: vector}) == {row + 1: f"1 of {DIMENSION} numbers are not finite"}


@pytest.mark.parametrize("answer", [REFERENCE[3][:-1], [REFERENCE[3]], [], 1.0])
def test_another_shape_is_found(answer: Any) -> None:
    assert "shape" in wrong({3: answer})[4]


@pytest.mark.parametrize("answer", ["text", {"base64": ""}, None])
def test_what_is_no_vector_is_found(answer: Any) -> None:
    assert set(wrong({3: answer})) == {4}


def test_a_missing_row_and_a_failed_one_are_found() -> None:
    answers = {row: REFERENCE[row] for row in range(ROWS) if row != 5} | {2: Failed("FAILURE: E: broken")}
    result = compare(REFERENCE, answers, Tolerance())
    assert [(found.row, found.problem) for found in result.findings] == [(3, "FAILURE: E: broken"), (6, "no answer")]
    assert result.compared == ROWS - 2


def test_no_answer_at_all_gives_no_figures() -> None:
    result = compare(REFERENCE, {}, Tolerance())
    assert len(result.findings) == ROWS
    assert result.worst_cosine is result.mean_cosine is result.max_difference is None


def test_equal_references_may_stand_for_each_other() -> None:
    assert compare([REFERENCE[0]] * 3, dict.fromkeys(range(3), REFERENCE[0]), Tolerance()).in_order


def test_the_golden_texts_are_ones_that_the_task_takes() -> None:
    chosen = texts()
    assert len(set(chosen)) < len(chosen)
    assert all(text.strip() and text.encode() and len(text) <= 1_000_000 for text in chosen)
