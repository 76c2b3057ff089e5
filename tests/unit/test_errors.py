"""Whether a signal's handler raised an error."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from legit_worker.errors import is_of_handler


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def rung(handler: Callable[..., Any]) -> Exception:
    """What comes out of code that a signal interrupts."""
    signal.signal(signal.SIGUSR1, handler)
    with pytest.raises(LookupError) as caught:
        signal.raise_signal(signal.SIGUSR1)
    return caught.value


def plain(number: int, frame: FrameType | None) -> None:
    raise LookupError


def any_arguments(*_: object) -> None:
    raise LookupError


def with_an_option(*_: object, option: int = 0) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    raise LookupError(option)


def replaced(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    raise LookupError


def renamed(number: int, frame: FrameType | None) -> None:
    frame = None
    raise LookupError(frame)


def deeper(number: int, frame: FrameType | None) -> None:
    plain(number, None)


class Alarm:
    def __call__(self, *_: object) -> None:
        raise LookupError


@pytest.mark.parametrize(
    "handler",
    [plain, any_arguments, with_an_option, replaced, renamed, deeper, Alarm(), functools.partial(plain)],
    ids=["plain", "any arguments", "with an option", "replaced", "renamed", "deeper", "object", "partial"],
)
def test_what_a_handler_raised_is_its_own(handler: Callable[..., Any]) -> None:
    assert is_of_handler(rung(handler))


def test_what_other_code_raised_is_no_handlers() -> None:
    def looks_at_its_caller(values: tuple[Any, ...]) -> None:
        frame = sys._getframe(1)
        raise LookupError(frame, values)

    nested: Any = ()
    for _ in range(100_000):
        nested = (nested,)
    with pytest.raises(LookupError) as caught:
        looks_at_its_caller(nested)
    assert not is_of_handler(caught.value)
    del nested


def test_a_strangers_argument_is_not_asked_for_its_class() -> None:
    class Lazy:
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            raise RuntimeError("not yet")

    def fails(value: object) -> None:
        raise LookupError

    with pytest.raises(LookupError) as caught:
        fails(Lazy())
    assert not is_of_handler(caught.value)
