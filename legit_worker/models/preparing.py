"""How items become ready for a batch without keeping the thread from other tasks.

In: items of a call. Out: the prepared items, after the other tasks had their turns. Many items are prepared for a few
milliseconds at a time. A long text is tokenized on a thread of its own, without the interpreter lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any, Protocol, TypeVar

from legit_worker import parking
from legit_worker.models.methods import away

T = TypeVar("T")

#: Seconds for which one task prepares before others run: as long as a short batch takes on a CPU.
SLICE = 0.005

#: Begins the names of the threads that tokenize, in Rust.
THREAD = "legit-tokenizer"

#: Characters that are tokenized on a thread: these take 20 ms, a hundred times as long as the way to a thread and back.
LONG = 20_000


class Preparing(Protocol):
    """What prepares items."""

    alias: str

    def preprocess(self, item: Any) -> Any:
        """One item, ready for a batch."""


#: When this task last began to prepare, or last let others run meanwhile, by the monotonic clock.
_since: ContextVar[float] = ContextVar("legit_worker_preparing_since")


def prepare(model: Preparing, items: Sequence[Any]) -> list[Any]:
    """Prepare each item; let other tasks run every `SLICE`. Raises what the model raises."""
    return each(model.preprocess, items, model.alias)


def each(function: Callable[[Any], T], items: Sequence[Any], alias: str) -> list[T]:
    """Call the function with each item, which it prepares for model `alias`; let other tasks run every `SLICE`."""
    _since.set(monotonic())
    prepared = []
    for number, item in enumerate(items):
        if number:
            take_turns(alias)
        prepared.append(function(item))
    return prepared


def take_turns(alias: str) -> None:
    """Let other tasks run if this one has prepared for `SLICE` since it last did that."""
    since = _since.get(None)
    if since is not None:
        if monotonic() - since < SLICE:
            return
        parking.give_way(f"its turn to prepare items for model {alias}")
    _since.set(monotonic())


class Aside:
    """Runs what takes long for one model on a thread of its own, one at a time, while other tasks go on.

    Called by one thread at a time, in a model's method.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD)
        # What is not done yet, and the process whose threads do it: a forked child has none of them.
        self._unfinished: set[object] = set()
        self._pid = os.getpid()

    @property
    def is_busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._unfinished)

    def run(self, function: Callable[[], T], characters: int) -> T:
        """Call the function here if it reads few characters, and nothing that is under way keeps its state."""
        self._look_at_process()
        if characters < LONG and not self.is_busy:
            return function()
        mark = object()
        self._unfinished.add(mark)
        try:
            done = self._executor.submit(self._in_turn, function)
        except RuntimeError:  # no thread can be started
            self._unfinished.discard(mark)
            raise
        done.add_done_callback(lambda _: self._unfinished.discard(mark))
        try:
            with away():
                parking.wait(done, "a long text to be tokenized", is_own=True)
        finally:
            done.cancel()  # the task may have been ended meanwhile
        return done.result()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold up what would run on a thread; begin when nothing does. For code that can't let others go on."""
        self._look_at_process()
        with self._turn:
            yield

    def _look_at_process(self) -> None:
        if self._pid != os.getpid():
            self.__init__()  # type: ignore[misc]

    def _in_turn(self, function: Callable[[], T]) -> T:
        with self._turn:
            return function()
