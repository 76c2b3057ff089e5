"""Every error this project raises, and what there is to ask of any error.

In: an error, or nothing. Out: exception classes; what an error says, and whether a signal's handler raised it. A
class's only argument is the message, so each error survives a Celery result in JSON (`exc_type`, `exc_module`,
`exc_message`).
"""

from __future__ import annotations

import reprlib
import signal
from collections.abc import Callable, Iterator
from inspect import CO_VARARGS
from itertools import pairwise
from traceback import walk_tb
from types import CodeType, FrameType
from typing import Any


class LegitWorkerError(Exception):
    """The base of all errors raised by legit_worker."""

    #: Whether the same message, sent again later, could succeed. Result envelopes say so.
    retryable: bool = False


class InvalidInputError(LegitWorkerError, ValueError):
    """No model can compute the caller's input: it is empty, too long, not text, not finite, or no image."""


class LimitError(LegitWorkerError):
    """A model can't read that many tokens, or has no vectors that long, or no prompt of that name.

    A handle says who asked, by another error.
    """


class UnknownModelError(LegitWorkerError, LookupError):
    """No configured model has this alias, or the task named none and there are several."""


class ModelLoadError(LegitWorkerError):
    """A configured model could not be loaded."""

    retryable = True


class CallsModelError(LegitWorkerError):
    """A method of a model calls another model, and can't wait for it."""


class BackendError(LegitWorkerError):
    """A backend can't compute a model."""


class WaitedTooLongError(LegitWorkerError):
    """A task waited longer than `LEGIT_WORKER_MAX_WAIT_SECONDS` for company, for its turn and for models to load."""

    retryable = True


class DeviceOutOfMemoryError(LegitWorkerError):
    """One item, alone in its batch, needs more memory than the device has."""

    retryable = True


class DeviceLostError(LegitWorkerError):
    """A kernel broke the process's CUDA context. The worker must start again before it can compute."""

    retryable = True


class CudaForbiddenError(LegitWorkerError):
    """A process that must not touch CUDA tried to."""


class PoisonedMessageError(LegitWorkerError):
    """A task's message was delivered `LEGIT_WORKER_MAX_DELIVERIES` times, and each time its worker died."""


class RoutingError(LegitWorkerError):
    """A result could not be delivered to its app's queue."""

    retryable = True


class SettingsError(LegitWorkerError, ValueError):
    """A setting is unknown or has a bad value; the message names the variable."""


#: The most characters of a stranger's value in an error.
MOST_SHOWN = 80


def shown(value: Any) -> str:
    """Write a stranger's value for an error: only its beginning, and in a form that UTF-8 can encode."""
    return _short.repr(value).encode(errors="backslashreplace").decode()


def said(error: BaseException) -> str:
    """Return an error's message. If a stranger's class can't tell it, say so."""
    try:
        return str(error)
    except Exception as other:
        return f"its message can't be read, since its __str__() raises {type(other).__name__}"


def is_of_handler(error: BaseException) -> bool:
    """Whether a signal's handler raised it, and not the code that the signal interrupted.

    A handler is installed, or has the frame that it interrupted among its arguments: a library may have installed
    another one before it raised.
    """
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {_code_of(handler) for handler in handlers if callable(handler)}
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return any(frame.f_code in codes for frame in frames) or any(
        any(value is earlier for value in _arguments(later)) for earlier, later in pairwise(frames)
    )


def _code_of(handler: Callable[..., Any]) -> CodeType | None:
    """The code of a function, a method, a `functools.partial` or an object that is called; None if it has none."""
    function: Any = getattr(handler, "func", handler)
    return getattr(function, "__code__", None) or getattr(function.__call__, "__code__", None)


def _arguments(frame: FrameType) -> Iterator[Any]:
    """What a function was called with, if it has not changed these names."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & CO_VARARGS)
    for name in code.co_varnames[:count]:
        value = frame.f_locals.get(name)
        yield value
        if type(value) is tuple:
            yield from value


_short = reprlib.Repr()
_short.maxstring = _short.maxother = MOST_SHOWN
_short.maxlevel, _short.maxlist, _short.maxdict = 2, 3, 3
