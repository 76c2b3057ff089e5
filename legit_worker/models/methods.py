"""Which model's method this code is in, and what it may do there.

In: calls of a model's methods, from any thread. Out: the same calls, one thread at a time if a method keeps state; and
an error if a method calls another model but can't wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from legit_worker.errors import CallsModelError


@dataclass(frozen=True, slots=True)
class _Inside:
    """Code runs in a model's method."""

    alias: str
    method: str
    thread: int
    #: What this code holds, and gives up while it waits for another model. None: the method can't wait.
    lock: threading.Lock | None
    #: It has given up the lock, and is in its call of another model.
    is_away: bool = False


#: None in a task's own code. A context of its own for each task and each thread.
_inside: ContextVar[_Inside | None] = ContextVar("legit_worker_inside", default=None)


#: The context of code that holds no lock.
_STAYS = nullcontext()


class Methods:
    """Calls one model's methods. Any thread may use it."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        #: Held while a thread is in a method that keeps state, or computes a batch.
        self.lock = threading.Lock()

    def alone(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method while no other thread is in one: tokenizers keep state. The method may call other models.

        While it does, the lock is free: other tasks of this thread may come into the same method.
        """
        with self.lock:
            return self._call(_Inside(self._alias, name, threading.get_ident(), self.lock), method, arguments)

    def at_once(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method that runs while others wait for it, so it may not call a model."""
        return self._call(_Inside(self._alias, name, threading.get_ident(), None), method, arguments)

    @staticmethod
    def _call(inside: _Inside, method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        token = _inside.set(inside)
        try:
            return method(*arguments)
        finally:
            _inside.reset(token)


def leave(alias: str) -> AbstractContextManager[None]:
    """Call model `alias` from here. Raise `CallsModelError` in a model's method that can't wait for it."""
    here = _here()
    if here is not None and here.lock is None:
        raise CallsModelError(
            f"model {here.alias!r} calls model {alias!r} in its {here.method}(), for which other tasks wait: "
            f"call {alias!r} in preprocess(), or in the task before it calls {here.alias!r}"
        )
    return away()


def away() -> AbstractContextManager[None]:
    """Give up the lock of the method that this code is in, if it holds one, while it waits."""
    here = _here()
    return _STAYS if here is None or here.lock is None else _away(here, here.lock)


@contextmanager
def _away(here: _Inside, lock: threading.Lock) -> Iterator[None]:
    token = _inside.set(replace(here, is_away=True))
    lock.release()
    try:
        yield
    finally:
        lock.acquire()
        _inside.reset(token)


def _here() -> _Inside | None:
    here = _inside.get()
    return None if here is None or here.is_away or here.thread != threading.get_ident() else here


def is_in_another_call() -> bool:
    """Whether this code is in a call of a model, which holds that model while the code waits for another one."""
    return _inside.get() is not None
