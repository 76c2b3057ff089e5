"""How a caller wants texts to be embedded.

In: the arguments of a task, from any client. Out: options of a handle's `encode`, or `InvalidInputError`.
"""

from __future__ import annotations

from typing import Any

from legit_worker.errors import InvalidInputError, shown
from legit_worker.inputs.texts import check_unicode

#: What the texts may be.
TASKS = ("query", "document")

#: How a vector's numbers may be written, as in the library.
PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")

#: Those whose scale is taken from a call's own vectors, which one vector has not.
SCALED = ("int8", "uint8")


def wording_of(task: Any, prompt_name: Any, prompt: Any, most: int) -> dict[str, str]:
    """Check what a task says of its texts: which kind they are, and what stands before them."""
    if task is not None and task not in TASKS:
        raise InvalidInputError(f"task must be {' or '.join(TASKS)}, got {shown(task)}")
    for name, value in (("prompt_name", prompt_name), ("prompt", prompt)):
        if value is not None and not isinstance(value, str):
            raise InvalidInputError(f"{name} must be a string, got {type(value).__name__}")
    if prompt is not None:
        check_unicode(prompt)
        if prompt_name is not None:
            raise InvalidInputError("a task gives prompt or prompt_name, not both")
        if len(prompt) > most:
            raise InvalidInputError(f"the prompt has {len(prompt)} characters and one may have {most}: shorten it")
    given = {"task": task, "prompt_name": prompt_name, "prompt": prompt}
    return {name: value for name, value in given.items() if value is not None}


def form_of(dimensions: Any, precision: Any, normalize: Any) -> dict[str, Any]:
    """Check what a task says of its vectors: how many numbers they have, how these are written, and their length."""
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise InvalidInputError(f"dimensions must be a whole number of at least 1, got {shown(dimensions)}")
    if precision is not None and precision not in PRECISIONS:
        raise InvalidInputError(f"precision must be one of {', '.join(PRECISIONS)}, got {shown(precision)}")
    given = {
        "truncate_dim": dimensions,
        "precision": precision,
        "normalize_embeddings": None if normalize is None else switch_of("normalize", normalize),
    }
    return {name: value for name, value in given.items() if value is not None}


def switch_of(name: str, value: Any) -> bool:
    """Read an argument that is on or off. JSON's 1 and 0 count, but no words: a client may mean `"false"` as off."""
    if value not in (True, False):
        raise InvalidInputError(f"{name} must be true or false, got {shown(value)}")
    return bool(value)
