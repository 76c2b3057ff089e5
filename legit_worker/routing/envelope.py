"""The envelope: one JSON object that tells an app how a task ended. Pure.

In: how a task ended. Out: the object's bytes, as in `docs/envelope.schema.json`. A result that JSON can't hold becomes
a failure that says why.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timezone
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError

from legit_worker.errors import RoutingError, said

#: The version of the envelope. `docs/result-routing.md` says what may change within one version.
VERSION = 1

#: The most characters of an error's message.
MAX_MESSAGE = 2000

#: Errors that may not come again if the same message is sent again.
_RETRYABLE = (ConnectionError, TimeoutError, SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError)

#: The user and password of a URL.
_CREDENTIALS = re.compile(r"(?<=://)[^\s/]+(?=@)")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one task ended."""

    id: str
    task: str
    app: str
    status: Literal["SUCCESS", "FAILURE", "REVOKED"]
    #: The task's return value, of any type; None if it failed.
    result: Any = None
    error: BaseException | None = None
    #: 1 for the first attempt. A retry counts, a redelivery of the same message does not.
    attempt: int = 1
    #: The alias of the model that it called last.
    model: str | None = None
    #: What computed its vectors or scores: revision, dimensions, dtype, prompt, backend. None if no model has.
    computed_by: Mapping[str, Any] | None = None
    #: The span of its run, or the one that its message names, as W3C Trace Context writes it.
    traceparent: str | None = None
    #: The producer's header `meta`.
    meta: Any = None
    #: The producer's header `queued_at`, an ISO 8601 time.
    queued_at: Any = None
    #: Seconds since the epoch; None if it never began.
    started_at: float | None = None
    finished_at: float
    worker: str


def seal(ending: Ending, *, encoding: str, max_bytes: int) -> bytes:
    """Write the envelope, in UTF-8. With the encoding `base64`, arrays of floats are base64."""
    try:
        result = _with_base64(_plain(ending.result)) if encoding == "base64" else ending.result
        envelope = _dumped(_fields(ending) | {"result": result})
    except (TypeError, ValueError, RecursionError) as error:
        return _refusal(ending, f"the result of {ending.task} is not valid JSON: {error}", max_bytes)
    if len(envelope) > max_bytes:
        sizes = f"{len(envelope)} bytes, and LEGIT_WORKER_RESULT_MAX_BYTES allows {max_bytes}"
        return _refusal(ending, f"the result of {ending.task} has {sizes}", max_bytes)
    return envelope


def _refusal(ending: Ending, message: str, max_bytes: int) -> bytes:
    """Write a failure in place of a result that can't be sent, with `meta` if JSON can hold that.

    It does not say what computed the result: a sender's prompt is in that, and may be why the result can't be sent.
    """
    error = RoutingError(message)
    error.retryable = False
    failed = replace(ending, status="FAILURE", result=None, error=error, queued_at=None, computed_by=None)
    for candidate in (failed, replace(failed, meta=None)):
        try:
            envelope = _dumped(_fields(candidate))
        except (TypeError, ValueError, RecursionError):
            continue
        if len(envelope) <= max_bytes:
            return envelope
    return _dumped(_fields(replace(failed, meta=None)), errors="replace")


def _fields(ending: Ending) -> dict[str, Any]:
    """Return all fields but the result."""
    return {
        "v": VERSION,
        "id": ending.id,
        "task": ending.task,
        "app": ending.app,
        "status": ending.status,
        "result": None,
        "error": None if ending.error is None else _error(ending.error),
        "attempt": ending.attempt,
        "model": ending.model,
        "computed_by": ending.computed_by,
        "traceparent": ending.traceparent,
        "meta": ending.meta,
        "queued_at": _checked_time(ending.queued_at),
        "started_at": None if ending.started_at is None else _time(ending.started_at),
        "finished_at": _time(ending.finished_at),
        "worker": ending.worker,
    }


def _error(error: BaseException) -> dict[str, Any]:
    """Describe an error without its traceback, and without the passwords of URLs in its message."""
    # Celery wraps an error that it can't pickle. The wrapper has the name that the task's author knows.
    name = getattr(error, "exc_cls_name", None) or type(error).__name__
    return {
        "type": name,
        "message": _CREDENTIALS.sub("***", said(error))[:MAX_MESSAGE].encode(errors="replace").decode(),
        "retryable": bool(getattr(error, "retryable", isinstance(error, _RETRYABLE))),
    }


def _time(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
    return moment.replace("+00:00", "Z")


def _checked_time(text: Any) -> str | None:
    """Return a producer's text as a time; None if it is none."""
    try:
        return _time(datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc).timestamp())
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None


def _dumped(value: Any, errors: str = "strict") -> bytes:
    # Neither PHP nor JavaScript can read NaN.
    text = json.dumps(value, default=_plain_object, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors=errors)


def _plain_object(value: Any) -> Any:
    """Convert arrays, and the types that Celery's serializers accept besides JSON. Raises `TypeError`."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, UUID | Decimal):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "tolist"):  # numpy's and torch's, without importing either
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _with_base64(value: Any) -> Any:
    """Write each array of floats, of any rank, as `{"base64", "dtype", "shape"}`: little-endian float32, by rows."""
    if isinstance(value, Mapping):
        return {key: _with_base64(_plain(inner)) for key, inner in value.items()}
    if not isinstance(value, list | tuple):
        return value
    floats: list[float] = []
    shape = _shape(value, floats)
    if shape is None:
        return [_with_base64(_plain(inner)) for inner in value]
    if not all(map(math.isfinite, floats)):
        raise ValueError("an array holds a number that is not finite")
    try:
        packed = struct.pack(f"<{len(floats)}f", *floats)
    except OverflowError:
        return value
    return {"base64": base64.b64encode(packed).decode(), "dtype": "<f4", "shape": list(shape)}


def _shape(value: Any, floats: list[float]) -> tuple[int, ...] | None:
    """Return the shape of a rectangular list of floats, and add its numbers to `floats`. None for anything else."""
    if isinstance(value, float):
        floats.append(value)
        return ()
    if not isinstance(value, list | tuple) or not value:
        return None
    first = _shape(value[0], floats)
    if first is None or any(_shape(inner, floats) != first for inner in value[1:]):
        return None
    return (len(value), *first)
