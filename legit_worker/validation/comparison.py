"""How a worker's answers compare with the reference. Pure.

In: the reference's answers, and an answer for each row, or none. Out: figures for a table, and each wrong row with its
problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from legit_worker.validation.forms import VECTOR, Form, Numbers, Vectors, flat

#: Two references whose distance is at most this share of their length count as one, since an answer can't tell them
#: apart: rounding moves a vector by 1e-6 of its length.
SAME = 1e-5


@dataclass(frozen=True)
class Failed:
    """A row without a vector, and the reason."""

    reason: str


#: One row's answer: what the task gave, or `Failed`.
Answer = Any


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an answer may be from its reference."""

    #: The least cosine between their vectors.
    min_cosine: float = 0.9999
    #: The most by which any one number, or the length of a vector, may differ. If a vector is longer than 1, or a score
    #: larger, it is a share of this length or score.
    max_difference: float = 1e-3


#: By the type in which a model computes. `scripts/lib/tolerances.py` measured them with all-MiniLM-L6-v2 on a CPU: the
#: worst of the golden texts of up to 400 characters, in batches, against the library's answer for the text alone, in
#: the same type and in float32.
MEASURED = {
    #: Measured: a cosine of 1 - 2e-12 and a difference of 4e-7. Other processors add up in another order.
    "float32": Tolerance(min_cosine=0.9999, max_difference=1e-3),
    #: Measured: 1 - 2.7e-6 and 6e-4.
    "float16": Tolerance(min_cosine=0.9999, max_difference=5e-3),
    #: Measured: 1 - 2.0e-4 and 3.6e-3.
    "bfloat16": Tolerance(min_cosine=0.999, max_difference=2e-2),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One wrong row."""

    #: From 1, as lines are counted.
    row: int
    #: The problem in words.
    problem: str
    #: None if there are no vectors to compare.
    cosine: float | None = None
    #: The largest difference of any one number.
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows of one path."""

    rows: int
    #: The number of rows with finite numbers, as many as the reference has.
    compared: int
    #: This and the next three are about the compared rows; None if there are none, or if scores have no such figure.
    worst_cosine: float | None
    mean_cosine: float | None
    max_difference: float | None
    max_norm_difference: float | None
    #: Whether each compared row is closer to its own reference than to any other; of scores: whether each row has the
    #: reference's order.
    in_order: bool
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """One row's figures."""

    row: int
    difference: float
    #: None for scores, as the next one.
    cosine: float | None = None
    norm_difference: float | None = None
    #: What is wrong with its place or its order.
    misplaced: str = ""

    def finding(self, tolerance: Tolerance) -> Finding | None:
        problem = "; ".join(self._problems(tolerance))
        if not problem:
            return None
        return Finding(row=self.row + 1, problem=problem, cosine=self.cosine, difference=self.difference)

    def _problems(self, tolerance: Tolerance) -> Iterator[str]:
        if self.misplaced:
            yield self.misplaced
        if self.cosine is not None and self.cosine < tolerance.min_cosine:
            yield f"cosine below {tolerance.min_cosine:g}"
        if self.difference > tolerance.max_difference:
            yield f"a number differs by more than {tolerance.max_difference:g}"
        if self.norm_difference is not None and self.norm_difference > tolerance.max_difference:
            yield f"length differs by {self.norm_difference:.2g}"


def compare(
    reference: Sequence[Any], answers: Mapping[int, Answer], tolerance: Tolerance, form: Form = VECTOR
) -> Comparison:
    """Compare each row's answer with its reference. `reference`: right answers; `answers` by row, from 0."""
    expected = [form.read(right) for right in reference]
    findings: list[Finding] = []
    kept: dict[int, Numbers] = {}
    for row, right in enumerate(expected):
        numbers, problem = _read(form, answers.get(row, Failed("no answer")), right)
        if numbers is None:
            findings.append(Finding(row=row + 1, problem=problem))
        else:
            kept[row] = numbers
    figures = list(_of_scores(expected, kept, tolerance) if form.ranks else _of_vectors(expected, kept))
    findings += [found for figure in figures if (found := figure.finding(tolerance))]
    cosines = [figure.cosine for figure in figures if figure.cosine is not None]
    return Comparison(
        rows=len(expected),
        compared=len(kept),
        worst_cosine=min(cosines, default=None),
        mean_cosine=math.fsum(cosines) / len(cosines) if cosines else None,
        max_difference=max((figure.difference for figure in figures), default=None),
        max_norm_difference=max(
            (figure.norm_difference for figure in figures if figure.norm_difference is not None), default=None
        ),
        in_order=not any(figure.misplaced for figure in figures),
        findings=tuple(sorted(findings, key=lambda finding: finding.row)),
    )


def _read(form: Form, answer: Answer, right: Numbers) -> tuple[Numbers | None, str]:
    """Return the answer's numbers, or None and the problem."""
    if isinstance(answer, Failed):
        return None, answer.reason
    try:
        numbers = form.read(answer)
    except ValueError as error:
        return None, str(error)
    all_numbers = flat(numbers)
    if not np.isfinite(all_numbers).all():
        return None, f"{int((~np.isfinite(all_numbers)).sum())} of {all_numbers.size} numbers are not finite"
    if isinstance(numbers, dict) or isinstance(right, dict):
        same = not form.ranks or set(numbers) == set(right)
        return (numbers, "") if same else (None, f"scores of {len(numbers)}, and not of the same {len(right)}")
    if numbers.shape != right.shape:
        return None, f"shape {_shape(numbers)}, and not {_shape(right)}"
    return numbers, ""


def _shape(numbers: Vectors) -> list[int]:
    return list(numbers.shape[1:] if len(numbers) == 1 else numbers.shape)


def _of_vectors(expected: Sequence[Numbers], kept: Mapping[int, Numbers]) -> Iterator[_Figures]:
    right, found = _dense(expected, kept)
    closest = _closest(right, found)
    for row, vectors in found.items():
        norms, lengths = np.linalg.norm(vectors, axis=1), np.linalg.norm(right[row], axis=1)
        unit = np.maximum(lengths, 1)
        other = closest[row]
        yield _Figures(
            row=row,
            cosine=float(_cosines(vectors, norms, right[row], lengths).min(initial=1)),
            difference=float((np.abs(vectors - right[row]) / unit[:, None]).max(initial=0)),
            norm_difference=float((np.abs(norms - lengths) / unit).max(initial=0)),
            misplaced="" if other == row else f"closest to the reference of row {other + 1}",
        )


def _dense(expected: Sequence[Numbers], kept: Mapping[int, Numbers]) -> tuple[dict[int, Vectors], dict[int, Vectors]]:
    """Both sides as vectors. Sparse ones have a column for each place that any of them has."""
    sparse = [one for one in (*expected, *kept.values()) if isinstance(one, dict)]
    columns = {place: column for column, place in enumerate(sorted(set().union(*sparse)))}

    def dense(numbers: Numbers) -> Vectors:
        if not isinstance(numbers, dict):
            return numbers
        row = np.zeros((1, len(columns)))
        row[0, [columns[place] for place in numbers]] = list(numbers.values())
        return row

    return dict(enumerate(map(dense, expected))), {row: dense(numbers) for row, numbers in kept.items()}


def _cosines(left: Vectors, left_norms: Vectors, right: Vectors, right_norms: Vectors) -> Vectors:
    """Return each vector's cosine: 1 for two vectors of length zero, and 0 if only one has length zero."""
    are_zero = (left_norms == 0) | (right_norms == 0)
    units = np.where(left_norms == 0, 1, left_norms), np.where(right_norms == 0, 1, right_norms)
    cosines: Vectors = ((left / units[0][:, None]) * (right / units[1][:, None])).sum(axis=1)
    return np.where(are_zero, left_norms == right_norms, np.clip(cosines, -1, 1)).astype(np.float64)


def _closest(right: Mapping[int, Vectors], found: Mapping[int, Vectors]) -> dict[int, int]:
    """Return for each row the one whose reference is closest: the row itself, unless another is clearly closer."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, vectors in right.items():
        by_shape.setdefault(vectors.shape, []).append(row)
    closest: dict[int, int] = {}
    for rows in by_shape.values():
        references = np.stack([right[row].ravel() for row in rows])
        for row in filter(found.__contains__, rows):
            nearest = rows[int(np.linalg.norm(references - found[row].ravel(), axis=1).argmin())]
            apart = float(np.linalg.norm(right[nearest] - right[row]))
            closest[row] = row if apart <= SAME * float(np.linalg.norm(right[row])) else nearest
    return closest


def _of_scores(expected: Sequence[Numbers], kept: Mapping[int, Numbers], tolerance: Tolerance) -> Iterator[_Figures]:
    for row, found in kept.items():
        right = expected[row]
        assert isinstance(found, dict)
        assert isinstance(right, dict)
        unit = max(1.0, *map(abs, right.values()))
        yield _Figures(
            row=row,
            difference=max(abs(found[name] - right[name]) for name in right) / unit,
            misplaced=_out_of_order(list(found), right, 2 * tolerance.max_difference * unit),
        )


def _out_of_order(order: Sequence[Any], right: Mapping[Any, float], apart: float) -> str:
    """Name the first that comes behind one whose right score is lower, by more than two scores may both be wrong."""
    lowest = order[0]
    for name in order:
        if right[name] > right[lowest] + apart:
            return f"{name} comes behind {lowest}, whose right score is lower"
        lowest = min(lowest, name, key=right.__getitem__)
    return ""
