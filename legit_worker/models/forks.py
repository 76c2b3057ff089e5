"""Forks while a model loads: a child waits for ever for a module that a thread of its parent was importing.

In: a fork. Out: the fork, once no module is half imported; or a child that says what is wrong when it calls a model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import _bootstrap
from threading import RLock, get_ident
from time import monotonic, sleep
from typing import Any

from legit_worker.errors import ModelLoadError

#: Seconds for which a fork waits. Importing torch and a library on it takes 5 to 20.
MOST_SECONDS = 60.0

#: Seconds between two looks at all modules, which take about a millisecond.
LOOK = 0.02

#: In a child that was forked all the same: the module.
_half_imported: str | None = None


# Held by a thread that imports a model's class, and during a fork: no such import begins between the look and the fork.
_importing = RLock()


@contextmanager
def importing() -> Iterator[None]:
    """While a thread imports a model's class, no other thread forks."""
    with _importing:
        yield


def hold_imports() -> None:
    """Let no import of a model's class begin. Called before a fork."""
    _importing.acquire(timeout=MOST_SECONDS)


def wait_for_imports() -> None:
    """Let threads end the imports that they are in. Called before a fork, while a model loads."""
    until = monotonic() + MOST_SECONDS
    while _module_half_imported() is not None and monotonic() < until:
        sleep(LOOK)


def go_on() -> None:
    """Let imports begin again. Called in the parent after a fork, which may have waited in vain."""
    with suppress(RuntimeError):  # this thread does not hold it
        _importing.release()


def restart() -> None:
    """Forget who held up imports. Called in a forked child."""
    global _importing
    _importing = RLock()


def look_at_child() -> None:
    """Note whether a module is half imported, and its thread is not here. Called in a forked child."""
    global _half_imported
    _half_imported = _module_half_imported()


def check() -> None:
    """Raise `ModelLoadError` in a child that can't call a model."""
    if _half_imported is not None:
        raise ModelLoadError(
            f"this process was forked while another thread of its parent had been importing {_half_imported!r} for "
            f"{MOST_SECONDS:g} s, and would wait for ever for that: start it with multiprocessing's 'spawn', or call "
            "the model once before the fork, or set PIN=1 for it"
        )


def _module_half_imported() -> str | None:
    """Of another thread than this one, whose imports are its own to go on with."""
    for name, module in list(sys.modules.items()):
        if getattr(getattr(module, "__spec__", None), "_initializing", False) and not _is_ours(name):
            return name
    return None


def _is_ours(name: str) -> bool:
    locks: Any = _bootstrap._module_locks  # type: ignore[attr-defined]
    lock = locks.get(name, lambda: None)()
    return lock is not None and lock.owner == get_ident()
