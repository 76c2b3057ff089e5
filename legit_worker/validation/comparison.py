"""How a worker's answers compare with the reference. Pure.

In: the reference's vectors, and an answer for each row, or none. Out: figures for a table, and each wrong row with its
problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]

#: Two references whose distance is at most this share of their length count as one, since an answer can't tell them
#: apart: rounding moves a vector by 1e-6 of its length.
SAME = 1e-5


@dataclass(frozen=True)
class Failed:
    """A row without a vector, and the reason."""

    reason: str


#: One row's answer: a value that should be a vector, or `Failed`.
Answer = Any


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an answer may be from its reference."""

    #: The least cosine between them.
    min_cosine: float = 0.9999
    #: The most by which any one number, or the length of the whole vector, may differ.
    max_difference: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One wrong row."""

    #: From 1, as lines are counted.
    row: int
    #: The problem in words.
    problem: str
    #: None if there is no vector to compare.
    cosine: float | None = None
    #: The largest difference of any one number.
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of one path."""

    rows: int
    #: The number of rows with a finite vector of the right length.
    compared: int
    #: This and the next three are about the compared rows; None if there are none.
    worst_cosine: float | None
    mean_cosine: float | None
    max_difference: float | None
    max_norm_difference: float | None
    #: Whether each compared row is closer to its own reference than to any other.
    in_order: bool
    findings: tuple[Finding, ...]


def compare(reference: Sequence[Sequence[float]], answers: Mapping[int, Answer], tolerance: Tolerance) -> Comparison:
    """Compare each row's answer with its reference. `reference`: `[n, dim]`; `answers` by row, from 0."""
    expected: Vectors = np.asarray(reference, dtype=np.float64)
    findings: list[Finding] = []
    kept: dict[int, Vectors] = {}
    for row in range(len(expected)):
        vector, problem = _vector(answers.get(row, Failed("no answer")), expected.shape[1])
        if vector is None:
            findings.append(Finding(row=row + 1, problem=problem))
        else:
            kept[row] = vector
    figures = list(_measured(expected, kept))
    findings += [found for figure in figures if (found := figure.finding(tolerance))]
    return Comparison(
        rows=len(expected),
        compared=len(kept),
        worst_cosine=min((figure.cosine for figure in figures), default=None),
        mean_cosine=math.fsum(figure.cosine for figure in figures) / len(figures) if figures else None,
        max_difference=max((figure.difference for figure in figures), default=None),
        max_norm_difference=max((figure.norm_difference for figure in figures), default=None),
        in_order=all(figure.belongs_to == figure.row for figure in figures),
        findings=tuple(sorted(findings, key=lambda finding: finding.row)),
    )


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """One row's figures."""

    row: int
    cosine: float
    difference: float
    norm_difference: float
    #: The row whose reference is closest.
    belongs_to: int

    def finding(self, tolerance: Tolerance) -> Finding | None:
        problem = "; ".join(self._problems(tolerance))
        if not problem:
            return None
        return Finding(row=self.row + 1, problem=problem, cosine=self.cosine, difference=self.difference)

    def _problems(self, tolerance: Tolerance) -> Iterator[str]:
        if self.belongs_to != self.row:
            yield f"closest to the reference of row {self.belongs_to + 1}"
        if self.cosine < tolerance.min_cosine:
            yield f"cosine below {tolerance.min_cosine:g}"
        if self.difference > tolerance.max_difference:
            yield f"a number differs by more than {tolerance.max_difference:g}"
        if self.norm_difference > tolerance.max_difference:
            yield f"length differs by {self.norm_difference:.2g}"


def _vector(answer: Answer, dimension: int) -> tuple[Vectors | None, str]:
    """Return the answer as a vector, or None and the problem."""
    if isinstance(answer, Failed):
        return None, answer.reason
    try:
        array = np.asarray(answer)
    except (TypeError, ValueError):
        return None, f"not a vector but {type(answer).__name__}"
    # numpy would read a text such as "1.5" as a number.
    if array.size and array.dtype.kind not in "iuf":
        return None, f"not a vector of numbers but {type(answer).__name__} of {_kinds(answer)}"
    vector: Vectors = array.astype(np.float64)
    if vector.shape != (dimension,):
        return None, f"shape {list(vector.shape)}, and not [{dimension}]"
    if not np.isfinite(vector).all():
        return None, f"{int((~np.isfinite(vector)).sum())} of {dimension} numbers are not finite"
    return vector, ""


def _kinds(answer: Answer) -> str:
    parts = answer if isinstance(answer, list) else [answer]
    return ", ".join(sorted({type(part).__name__ for part in parts}))


def _measured(expected: Vectors, kept: Mapping[int, Vectors]) -> Iterator[_Figures]:
    norms = np.linalg.norm(expected, axis=1)
    for row, vector in kept.items():
        norm = float(np.linalg.norm(vector))
        yield _Figures(
            row=row,
            cosine=_cosine(vector, norm, expected[row], float(norms[row])),
            difference=float(np.abs(vector - expected[row]).max()),
            norm_difference=abs(norm - float(norms[row])),
            belongs_to=_closest(expected, row, vector),
        )


def _cosine(left: Vectors, left_norm: float, right: Vectors, right_norm: float) -> float:
    """Return the cosine: 1 for two vectors of length zero, and 0 if only one has length zero."""
    if left_norm == 0 or right_norm == 0:
        return float(left_norm == right_norm)
    return float(np.clip(left / left_norm @ (right / right_norm), -1, 1))


def _closest(expected: Vectors, row: int, vector: Vectors) -> int:
    """Return the row whose reference is closest to the vector: `row` itself, unless another is clearly closer."""
    distances = np.linalg.norm(expected - vector, axis=1)
    closest = int(distances.argmin())
    apart = float(np.linalg.norm(expected[closest] - expected[row]))
    return row if apart <= SAME * float(np.linalg.norm(expected[row])) else closest
