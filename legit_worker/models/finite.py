"""Outputs that are not finite, though the input may be fine.

In: a call's items and their outputs. Out: the same outputs. An item that gave NaN in a batch has what it gives alone:
some models give NaN for a short input beside a long one, since padding masks whole rows of their attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from legit_worker.errors import InvalidInputError

#: Items that are not finite alone either, after which a call's others are left: the model is broken, or computes in a
#: type that is too small, and each try keeps the thread.
ENOUGH = 4


def is_finite(output: Any) -> bool:
    """Tell whether an output has neither NaN nor infinity. What is no array of floats has none."""
    if isinstance(output, tuple):
        return all(map(is_finite, output))
    if not isinstance(output, np.ndarray) or output.dtype.kind != "f":
        return True
    return bool(np.isfinite(output).all())


def check_finite(values: Any, *, is_list: bool) -> None:
    """Raise `InvalidInputError` if a number of a result is not finite, with its item's place in a list."""
    finite = np.isfinite(values)
    if not finite.all():
        whose = f"item {finite.reshape(len(finite), -1).all(axis=1).argmin()}: " if is_list else ""
        raise InvalidInputError(f"{whose}the model's result is not finite for this input")


def with_second_try(items: list[Any], outputs: list[Any], alone: Callable[[Any], Any]) -> list[Any]:
    """Return the outputs; `alone(item)` gives those anew that are not finite."""
    hopeless = 0
    for index, output in enumerate(outputs):
        if hopeless < ENOUGH and not is_finite(output):
            outputs[index] = alone(items[index])
            hopeless += not is_finite(outputs[index])
    return outputs
