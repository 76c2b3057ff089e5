"""The file of texts and their right vectors.

In: texts, and a model's settings; or a file. Out: a file of JSON lines, or its content. The first line tells the origin
of the vectors; each other line is `{"text": …, "vector": […]}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from legit_worker.errors import LegitWorkerError
from legit_worker.settings import ModelSettings

#: The packages that compute the vectors.
PACKAGES = ("sentence-transformers", "transformers", "torch")


class ValidationError(LegitWorkerError):
    """The comparison can't be made."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file's content."""

    texts: list[str]
    vectors: list[list[float]]
    #: The first line, about the vectors' origin; empty if the file has no such line.
    origin: Mapping[str, Any] = field(default_factory=dict)


def make(texts: Iterable[str], model: ModelSettings) -> Iterator[tuple[str, list[float]]]:
    """Compute each text's vector by the library, alone, on the CPU, without a worker, with the alias's own options."""
    from sentence_transformers import SentenceTransformer

    dtype = _dtype(model)
    options = {**model.model_kwargs, **({"dtype": dtype} if dtype else {})}
    try:
        encoder = SentenceTransformer(
            model.path,
            device="cpu",
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=model.local_files_only,
            model_kwargs=options,
            processor_kwargs=model.processor_kwargs,
        )
    except Exception as error:
        raise ValidationError(f"the model at {model.path} can't be loaded: {error}") from error
    if model.max_seq_length is not None:
        encoder.max_seq_length = model.max_seq_length
    encode = getattr(encoder, f"encode_{model.task}" if model.task else "encode")
    asked = {
        **{"prompt_name": model.prompt_name, "prompt": model.prompt, "truncate_dim": model.dimensions},
        **{"precision": model.precision or "float32", "normalize_embeddings": bool(model.normalize)},
    }
    for text in texts:
        yield text, encode(text, show_progress_bar=False, **asked).tolist()


def _asked(model: ModelSettings) -> dict[str, Any]:
    """The alias's settings that change a vector, if they were made."""
    names = ("task", "prompt_name", "prompt", "dimensions", "precision", "normalize", "max_seq_length")
    return {name: value for name in names if (value := getattr(model, name)) is not None}


def _dtype(model: ModelSettings) -> str | None:
    """The type in which torch makes the reference: another backend is compared with float32, whatever it computes."""
    return model.dtype if model.backend == "torch" else "float32"


def write(path: Path, rows: Iterable[tuple[str, list[float]]], model: ModelSettings) -> None:
    """Write the file. Raises `ValidationError`."""
    lines = [origin(model), *({"text": text, "vector": vector} for text, vector in rows)]
    try:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ValidationError(f"{path} can't be written: {error.strerror}") from None


def origin(model: ModelSettings) -> dict[str, Any]:
    """Describe what makes the vectors: the model, and the packages' versions."""
    made_with = {package: version(package) for package in PACKAGES}
    known = {"model": model.path, "revision": model.revision, "dtype": _dtype(model), "made_with": made_with}
    return {**known, **({"asked": asked} if (asked := _asked(model)) else {})}


def read(path: Path) -> Reference:
    """Read a file. Raises `ValidationError`, with a line's number, if it is no reference."""
    lines = [(number, line) for number, line in enumerate(_lines(path), start=1) if line.strip()]
    objects = [(number, _parsed(path, number, line)) for number, line in lines]
    described = objects and "text" not in objects[0][1] and "model" in objects[0][1]
    rows = [_row(path, number, value) for number, value in objects[1 if described else 0 :]]
    if not rows:
        raise ValidationError(f"{path} holds no text: make it anew with --make-reference")
    lengths = sorted({len(vector) for _, vector in rows})
    if len(lengths) > 1:
        raise ValidationError(f"the vectors in {path} are of {len(lengths)} lengths, {lengths[0]} and {lengths[1]}")
    return Reference(
        texts=[text for text, _ in rows],
        vectors=[vector for _, vector in rows],
        origin=objects[0][1] if described else {},
    )


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
        raise ValidationError(f'line {number} of {path} should be {{"text": …, "vector": […]}}')
    return value


def _row(path: Path, number: int, value: Mapping[str, Any]) -> tuple[str, list[float]]:
    text, vector = value.get("text"), value.get("vector")
    if not isinstance(text, str) or not isinstance(vector, list) or not vector:
        raise ValidationError(f'line {number} of {path} should be {{"text": …, "vector": […]}}')
    if not all(_is_finite(part) for part in vector):
        raise ValidationError(f"line {number} of {path} has a vector that holds something other than finite numbers")
    return text, vector


def _is_finite(part: Any) -> bool:
    try:
        return isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part)
    except OverflowError:  # the integer is too large for a float
        return False
