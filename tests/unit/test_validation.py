"""No way of being wrong passes for agreement with the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from legit_worker.validation import golden
from legit_worker.validation.comparison import Comparison, Failed, Tolerance, compare

REFERENCE = np.random.default_rng(1).normal(size=(6, 8)).tolist()


def compared(**changes: Any) -> Comparison:
    """The reference against itself, but for these rows, `row0` and so on; None leaves one out."""
    answers: dict[int, Any] = dict(enumerate(REFERENCE)) | {int(name[3:]): value for name, value in changes.items()}
    return compare(REFERENCE, {row: answer for row, answer in answers.items() if answer is not None}, Tolerance())


def test_a_reference_agrees_with_itself() -> None:
    found = compared()
    assert (found.findings, found.compared, found.in_order) == ((), 6, True)
    assert found.worst_cosine == pytest.approx(1)
    assert found.max_difference == 0


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="missing"),
        pytest.param(Failed("FAILURE"), id="failed"),
        pytest.param([number * 1.01 for number in REFERENCE[2]], id="scaled"),
        pytest.param([*REFERENCE[2][:-1], math.nan], id="not finite"),
        pytest.param(REFERENCE[2][:-1], id="too short"),
        pytest.param([REFERENCE[2]], id="one level too deep"),
        pytest.param([-number for number in REFERENCE[2]], id="turned round"),
        pytest.param([REFERENCE[2][0] + 0.01, *REFERENCE[2][1:]], id="one number off"),
        pytest.param("text", id="no vector"),
    ],
)
def test_one_wrong_row_is_found_by_its_number(answer: Any) -> None:
    assert [finding.row for finding in compared(row2=answer).findings] == [3]


def test_rows_that_are_swapped_are_out_of_order() -> None:
    found = compared(row1=REFERENCE[4], row4=REFERENCE[1])
    assert not found.in_order
    assert [finding.row for finding in found.findings] == [2, 5]


def test_rounding_to_float32_agrees() -> None:
    rounded = {f"row{row}": np.asarray(vector, np.float32).tolist() for row, vector in enumerate(REFERENCE)}
    assert compared(**rounded).findings == ()


def test_the_golden_texts_are_of_all_the_kinds_that_once_broke_something() -> None:
    texts = golden.texts()
    assert len(texts) >= 80
    assert any(not text.isascii() for text in texts)
    assert max(map(len, texts)) > 1000
    assert min(map(len, texts)) <= 2
    assert len(set(texts)) < len(texts), "a repeated text shows that order is kept by place"
