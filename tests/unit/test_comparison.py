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
from legit_worker.validation.forms import MULTI, RERANK, SPARSE

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


def scored(*scores: float) -> list[dict[str, float]]:
    """Best first, each document with its score."""
    ranked = sorted(enumerate(scores), key=lambda one: -one[1])
    return [{"index": index, "score": score} for index, score in ranked]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (scored(0.5, 0.5004, 0.9), ""),
        (scored(0.5004, 0.5, 0.9), ""),  # as close as rounding may bring them
        (scored(0.95, 0.5, 0.9), "2 comes behind 0, whose right score is lower; a number differs"),
        (scored(0.5, 0.6, 0.9), "a number differs by more than 0.001"),
        (scored(0.5, 0.9), "scores of 2, and not of the same 3"),
        (scored(0.5, 0.5, 0.9)[::-1], "the scores are not best first"),
        ([{"index": 0, "score": "0.5"}], "not a vector of numbers but list of str"),
        ([0.5, 0.5, 0.9], "not a list of index and score"),
    ],
)
def test_an_order_that_rounding_does_not_explain_is_found(answer: Any, problem: str) -> None:
    result = compare([scored(0.5, 0.5004, 0.9)], {0: answer}, Tolerance(), RERANK)
    found = result.findings[0].problem if result.findings else ""
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
    assert result.worst_cosine is None


def weights(**values: float) -> dict[str, list[Any]]:
    """A sparse vector: `p3=0.5` has 0.5 at place 3."""
    return {"indices": [int(place[1:]) for place in values], "values": list(values.values())}


def test_sparse_vectors_are_compared_by_place() -> None:
    reference = [weights(p3=2.0, p700=1.0), weights(p3=2.0, p9=1.0)]
    right = {0: weights(p700=1.0, p3=2.0), 1: weights(p3=2.0, p9=1.0, p12=1e-6)}
    assert not compare(reference, right, Tolerance(), SPARSE).findings
    wrong = compare(reference, {0: reference[1], 1: weights(p3=2.0, p9=0.5)}, Tolerance(), SPARSE).findings
    assert [one.problem.split(";")[0] for one in wrong] == ["closest to the reference of row 2", "cosine below 0.9999"]
    broken = compare(reference, {0: {"indices": [1], "values": []}}, Tolerance(), SPARSE).findings[0]
    assert broken.problem == "not a sparse vector of indices and as many values"


def test_the_worst_token_of_a_text_counts() -> None:
    reference = [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]]]
    found = compare(reference, {row: [[1.0, 0.0], [1.0, 0.0]] for row in range(2)}, Tolerance(), MULTI)
    assert found.worst_cosine == 0
    assert [one.problem.split(";")[0] for one in found.findings] == ["cosine below 0.9999", "shape [2, 2], and not [2]"]


def test_a_long_vectors_difference_is_a_share_of_its_length() -> None:
    reference = [[300.0, 400.0]]
    assert not compare(reference, {0: [300.4, 400.0]}, Tolerance()).findings
    assert "a number differs" in compare(reference, {0: [301.0, 400.0]}, Tolerance()).findings[0].problem
