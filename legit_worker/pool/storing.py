"""Result backends that are not Redis: a task waits for one that raises errors.

Celery lets a backend's error go up to the worker. An `OSError` is a lost broker connection there: all messages come
again, and the task runs again, as long as the backend is away. Other errors end the worker.

In: Celery's calls around a task that ask its backend. Out: the same calls, made again until the backend takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from celery.backends.base import Backend, BaseKeyValueStoreBackend

from legit_worker import parking
from legit_worker.broker.refusals import DATA_ERRORS
from legit_worker.errors import is_of_handler
from legit_worker.quickjson import leave_out_caller
from legit_worker.results.backend import Groups, is_refused
from legit_worker.results.patience import Patient

#: The methods that Celery calls around a task (celery.backends.base, 5.5 to 5.7). RPC has its own `store_result`.
METHODS: tuple[tuple[Any, str], ...] = (
    (Backend, "store_result"),
    (Backend, "get_task_meta"),
    (BaseKeyValueStoreBackend, "on_chord_part_return"),
)


def store_patiently() -> Callable[[], None]:
    """Have tasks wait for their backend in these methods. Returns what undoes this."""
    before = [getattr(owner, name) for owner, name in METHODS]
    backends: WeakKeyDictionary[Any, Patient] = WeakKeyDictionary()
    for (owner, name), method in zip(METHODS, before, strict=True):
        setattr(owner, name, _patient(method, backends))

    def undo() -> None:
        for (owner, name), method in zip(METHODS, before, strict=True):
            setattr(owner, name, method)

    return undo


def _patient(method: Callable[..., Any], backends: WeakKeyDictionary[Any, Patient]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(backend: Any, first: Any, *args: Any, **options: Any) -> Any:
        """`first` is a task's id, or its request."""
        stock = partial(method, backend, first, *args, **options)
        if isinstance(backend, Groups) or not parking.is_around_task():
            try:
                return stock()
            except Exception as error:
                leave_out_caller(error)
                raise
        if backend not in backends:
            backends[backend] = Patient(type(backend).__name__, _is_own)
        return backends[backend].call(stock, getattr(first, "id", first))

    return call


def _is_own(error: Exception) -> bool:
    """Whether an error is one task's: over what it stores, or a signal's handler raised it."""
    is_of_data = isinstance(error, (*DATA_ERRORS, MemoryError)) and not isinstance(error, OSError)
    return is_of_data or is_refused(error) or is_of_handler(error)
