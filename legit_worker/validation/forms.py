"""What the built-in tasks answer, as numbers. Pure.

In: a row of a reference, or an answer, as JSON. Out: the task that the row is for, and its numbers; or `ValueError`
with the problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]

#: An answer's numbers: `[vectors, dim]`, or weights and scores by what they are of, in the answer's order.
Numbers = Vectors | dict[Any, float]


@dataclass(frozen=True, kw_only=True)
class Form:
    """The rows of one built-in task."""

    #: Its name, without the package's.
    task: str
    #: The names of its arguments that make an input. A row may have others of its arguments, too.
    inputs: tuple[str, ...]
    #: The name of the right answer in a row, and how an answer is read.
    answer: str
    read: Callable[[Any], Numbers]

    @property
    def ranks(self) -> bool:
        """Whether the answer is an order of scores, and no vector."""
        return self.answer == "scores"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input, and its right answer."""

    form: Form
    #: The task's arguments.
    asked: Mapping[str, Any]
    #: As the task gives it.
    right: Any

    def __str__(self) -> str:
        """The input, for a table's reader."""
        first = self.asked[self.form.inputs[0]]
        name = self.asked.get("task")
        shown = " / ".join(map(str, first)) if isinstance(first, list) else str(first)
        return shown if name is None else f"as {name}: {shown}"

    def to_json(self) -> dict[str, Any]:
        """A line of a reference file."""
        return {**self.asked, self.form.answer: self.right}


def row_of(line: Mapping[str, Any]) -> Row:
    """Read a line of a reference file. Raises `ValueError`."""
    forms = [form for form in FORMS if line.keys() >= {*form.inputs, form.answer}]
    if not forms:
        raise ValueError("no input with its answer")
    for form in forms:
        right = line[form.answer]
        try:
            numbers = form.read(right)
        except ValueError:
            continue
        if np.isfinite(flat(numbers)).all():
            return Row(form=form, asked={name: line[name] for name in line if name != form.answer}, right=right)
    raise ValueError(f"{forms[0].answer} holds something other than finite numbers")


def flat(numbers: Numbers) -> Vectors:
    """All numbers in a row."""
    return np.fromiter(numbers.values(), np.float64) if isinstance(numbers, dict) else numbers.ravel()


def vector(answer: Any) -> Numbers:
    """One vector, as `[1, dim]`."""
    return _numbers(answer)[None]


def vectors(answer: Any) -> Numbers:
    """A vector for each token: `[tokens, dim]`."""
    if isinstance(answer, np.ndarray):
        found: Vectors = answer.astype(np.float64)
    elif isinstance(answer, list):
        rows = [_numbers(one) for one in answer]
        if len({row.shape for row in rows}) > 1:
            raise ValueError("not vectors of one length")
        found = np.stack(rows) if rows else np.zeros((0, 0))
    else:
        raise ValueError(f"not a list of vectors but {type(answer).__name__}")
    if found.ndim != 2:
        raise ValueError(f"shape {list(found.shape)}, and not one vector for each token")
    return found


def weights(answer: Any) -> Numbers:
    """A sparse vector: its numbers by their places."""
    match answer:
        case {"indices": list(places), "values": values} if all(type(place) is int for place in places):
            numbers = _numbers(values)
            if len(set(places)) == len(places) == len(numbers):
                return dict(zip(places, numbers.tolist(), strict=True))
    raise ValueError("not a sparse vector of indices and as many values")


def scores(name: str) -> Callable[[Any], Numbers]:
    """Scores, best first, by what `name` says of each."""

    def is_scored(one: Any) -> bool:
        return isinstance(one, dict) and {name, "score"} <= one.keys()

    def read(answer: Any) -> Numbers:
        if not isinstance(answer, list) or not all(map(is_scored, answer)):
            raise ValueError(f"not a list of {name} and score but {type(answer).__name__}")
        numbers = _numbers([one["score"] for one in answer]).tolist()
        if any(after > before for before, after in itertools.pairwise(numbers)):
            raise ValueError("the scores are not best first")
        found = dict(zip((one[name] for one in answer), numbers, strict=True))
        if len(found) < len(answer):
            raise ValueError(f"one {name} comes twice")
        return found

    return read


def _numbers(values: Any) -> Vectors:
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise ValueError(f"shape {list(values.shape)}, and not one vector")
        return values.astype(np.float64)
    if not isinstance(values, list):
        shape = "a number, of shape []" if isinstance(values, int | float) else type(values).__name__
        raise ValueError(f"not a vector but {shape}")
    if values and isinstance(values[0], list):
        raise ValueError(f"shape [{len(values)}, {len(values[0])}], and not one vector")
    if not all(type(one) in (int, float) for one in values):
        kinds = ", ".join(sorted({type(one).__name__ for one in values}))
        raise ValueError(f"not a vector of numbers but list of {kinds}")
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:  # an integer is too large for a float
        raise ValueError("a number is too large for a float") from None


VECTOR = Form(task="embed_text", inputs=("text",), answer="vector", read=vector)
IMAGE = Form(task="embed_image", inputs=("image",), answer="vector", read=vector)
SPARSE = Form(task="embed_sparse", inputs=("text",), answer="vector", read=weights)
MULTI = Form(task="embed_multi", inputs=("text",), answer="vector", read=vectors)
RERANK = Form(task="rerank", inputs=("query", "documents"), answer="scores", read=scores("index"))
CLASSIFY = Form(task="classify", inputs=("pair",), answer="scores", read=scores("label"))

FORMS = (VECTOR, IMAGE, SPARSE, MULTI, RERANK, CLASSIFY)
