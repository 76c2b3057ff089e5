"""The ways by which an answer gets from a worker to an app. Pure.

In: a message of an app's queue, as its format's consumer reads it. Out: the task's id, and its answer or the reason why
there is none.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from legit_worker.validation.comparison import Answer, Failed

#: The path without an app: Celery's own result.
STOCK = "result backend"


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way to an app's queue."""

    #: Its name in the table.
    name: str
    format: Literal["json", "celery", "laravel"]
    encoding: Literal["json", "base64"] = "json"
    #: The task or job that would handle the results on the app's side.
    job: str = ""

    @property
    def app(self) -> str:
        """The app's name. Variables' names contain it, so it has no dashes and no two underscores in a row."""
        return f"legit_validate_{self.format}_{self.encoding}"

    def queue(self, run: str) -> str:
        """Return the app's queue in this run."""
        return f"{run}.{self.format}.{self.encoding}"

    def variables(self, run: str) -> dict[str, str]:
        """Return the variables that make a worker route the app's results."""
        chosen = {
            "RESULT_ROUTING": "on",
            "QUEUE": self.queue(run),
            "FORMAT": self.format,
            "ENCODING": self.encoding,
            "JOB": self.job,
        }
        return {f"LEGIT_WORKER_APPS__{self.app.upper()}__{name}": value for name, value in chosen.items()}


ROUTES = (
    Route(name="json", format="json"),
    Route(name="json, base64", format="json", encoding="base64"),
    Route(name="celery", format="celery", job="legit_validate.take"),
    Route(name="laravel", format="laravel", job="App\\Jobs\\LegitValidate@handle"),
)


def opened(route: Route, content: Any) -> tuple[str, Answer]:
    """Return the task's id and its answer. `content`: bytes, or kombu's decoded value. Raises `ValueError`."""
    value = _loaded(content) if isinstance(content, bytes | str) else content
    envelope = _UNWRAP[route.format](route, value)
    if not isinstance(envelope, Mapping) or not isinstance(envelope.get("id"), str):
        raise ValueError(f"no envelope with an id in {str(value)[:200]}")
    return envelope["id"], _answer(route, envelope)


def _loaded(content: bytes | str) -> Any:
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _celery(_: Route, value: Any) -> Any:
    """Read a Celery task's message: its arguments, its keyword arguments, and what follows the task."""
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], list) or len(value[0]) != 1:
        raise ValueError(f"not a Celery task with one argument: {str(value)[:200]}")
    return value[0][0]


def _laravel(route: Route, value: Any) -> Any:
    if not isinstance(value, dict) or value.get("job") != route.job:
        raise ValueError(f"not a Laravel job {route.job}: {str(value)[:200]}")
    return value.get("data")


_UNWRAP: dict[str, Callable[[Route, Any], Any]] = {
    "json": lambda _, value: value,
    "celery": _celery,
    "laravel": _laravel,
}


def _answer(route: Route, envelope: Mapping[str, Any]) -> Answer:
    if envelope.get("v") != 1 or envelope.get("app") != route.app:
        return Failed(f"envelope of version {envelope.get('v')} for app {envelope.get('app')}")
    if envelope.get("status") != "SUCCESS":
        error = envelope.get("error")
        told = f"{error.get('type')}: {error.get('message')}" if isinstance(error, Mapping) else error
        return Failed(f"{envelope.get('status')}: {told}")
    if route.encoding == "json":
        return envelope.get("result")
    try:
        return _unpacked(envelope.get("result"))
    except ValueError as error:
        return Failed(str(error))


def _unpacked(value: Any) -> Any:
    """Replace each packed array in a result. Raises `ValueError`."""
    match value:
        case {"base64": _}:
            return _array(value)
        case dict():
            return {name: _unpacked(inner) for name, inner in value.items()}
        case [float(), *_]:
            raise ValueError("the result has a list of numbers, with encoding base64")
        case list():
            return [_unpacked(inner) for inner in value]
    return value


def _array(packed: Mapping[str, Any]) -> NDArray[Any]:
    """Read an array of little-endian float32. Raises `ValueError`."""
    try:
        if packed["dtype"] != "<f4":
            raise ValueError(f"dtype {packed['dtype']!r}, and not '<f4'")
        if not _is_shape(packed["shape"]):
            raise ValueError(f"shape {packed['shape']!r}, and not a list of lengths")
        flat = np.frombuffer(base64.b64decode(packed["base64"], validate=True), "<f4")
        numbers: NDArray[Any] = flat.reshape(packed["shape"])
        return numbers
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"the base64 can't be read: {type(error).__name__}: {error}") from None


def _is_shape(shape: Any) -> bool:
    """Check a shape: numpy would replace a negative length by one that fits."""
    return isinstance(shape, list) and all(isinstance(length, int) and length >= 0 for length in shape)
