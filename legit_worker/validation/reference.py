"""The file of inputs and their right answers.

In: rows, and a model's settings; or a file. Out: a file of JSON lines, or its content. The first line tells the origin
of the answers; each other line is `{"text": …, "vector": […]}`, or another of the `forms`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from legit_worker.errors import LegitWorkerError
from legit_worker.settings import ModelSettings
from legit_worker.validation.forms import Form, Row, row_of, vector

#: The packages that compute the answers.
PACKAGES = ("sentence-transformers", "transformers", "torch")


class ValidationError(LegitWorkerError):
    """The comparison can't be made."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file's content."""

    rows: list[Row]
    #: The first line, about the answers' origin; empty if the file has no such line.
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """How its answers are read. All rows have the same kind of answer."""
        return self.rows[0].form


def _asked(model: ModelSettings) -> dict[str, Any]:
    """The alias's settings that change a vector, if they were made."""
    names = ("task", "prompt_name", "prompt", "dimensions", "precision", "normalize", "max_seq_length")
    return {name: value for name in names if (value := getattr(model, name)) is not None}


def dtype_of(model: ModelSettings) -> str | None:
    """The type in which torch makes the reference: another backend is compared with float32, whatever it computes."""
    dtype = model.dtype if model.backend == "torch" else "float32"
    return "float32" if dtype == "tf32" else dtype


def write(path: Path, rows: Iterable[Row], model: ModelSettings, computed_in: str) -> int:
    """Write the file, and return its number of rows. `computed_in`: the weights' type. Raises `ValidationError`."""
    lines = [{**origin(model), "computed_in": computed_in}, *(row.to_json() for row in rows)]
    try:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ValidationError(f"{path} can't be written: {error.strerror}") from None
    return len(lines) - 1


def origin(model: ModelSettings) -> dict[str, Any]:
    """Describe what makes the vectors: the model, and the packages' versions."""
    made_with = {package: version(package) for package in PACKAGES}
    known = {"model": model.path, "revision": model.revision, "dtype": dtype_of(model), "made_with": made_with}
    return {**known, **({"asked": asked} if (asked := _asked(model)) else {})}


def read(path: Path) -> Reference:
    """Read a file. Raises `ValidationError`, with a line's number, if it is no reference."""
    lines = [(number, line) for number, line in enumerate(_lines(path), start=1) if line.strip()]
    objects = [(number, _parsed(path, number, line)) for number, line in lines]
    described = objects and "model" in objects[0][1] and not {"vector", "scores"} & objects[0][1].keys()
    rows = [_row(path, number, value) for number, value in objects[1 if described else 0 :]]
    if not rows:
        raise ValidationError(f"{path} holds no input: make it anew with --make-reference")
    if len({row.form.read for row in rows}) > 1:
        raise ValidationError(f"{path} holds answers of different kinds of models: make a file of each")
    lengths = sorted({len(row.right) for row in rows if row.form.read is vector})
    if len(lengths) > 1:
        raise ValidationError(f"the vectors in {path} are of {len(lengths)} lengths, {lengths[0]} and {lengths[1]}")
    return Reference(rows=rows, origin=objects[0][1] if described else {})


def differences(reference: Reference, model: ModelSettings) -> list[str]:
    """Return one sentence for each difference between the reference's origin and this installation."""
    if not reference.origin:
        return []
    now, then = origin(model), reference.origin
    sentences = [
        f"the reference is of {name} {then.get(name)!r}, and the settings name {now.get(name)!r}"
        for name in ("model", "revision", "dtype", "asked")
        if then.get(name) != now.get(name)
    ]
    made_with = then.get("made_with")
    made_with = made_with if isinstance(made_with, Mapping) else {}
    return sentences + [
        f"the reference was made with {package} {made_with.get(package)}, and {installed} is installed"
        for package, installed in now["made_with"].items()
        if made_with.get(package) != installed
    ]


def read_texts(path: Path) -> list[str]:
    """Read a user's own texts, one per line. Raises `ValidationError`."""
    texts = [line for line in _lines(path) if line.strip()]
    if not texts:
        raise ValidationError(f"{path} holds no text: write one on each line")
    return texts


def _lines(path: Path) -> list[str]:
    try:
        # `splitlines` would also split at other line breaks, which JSON does not escape.
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # Python refuses numbers with thousands of digits
        raise ValidationError(f"line {number} of {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValidationError(f"line {number} of {path} should be a JSON object, and is {type(value).__name__}")
    return value


def _row(path: Path, number: int, value: Mapping[str, Any]) -> Row:
    try:
        row = row_of(value)
    except ValueError as error:
        raise ValidationError(
            f'line {number} of {path} has {error}: it should be {{"text": …, "vector": […]}}, or as --make-reference '
            "writes it for this kind of model"
        ) from None
    if not row.right:
        raise ValidationError(f"line {number} of {path} has no numbers")
    return row
