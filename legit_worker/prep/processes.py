"""Helper processes that prepare input beside the worker, without CUDA.

In: a function and its arguments. Out: the function's result. If a helper dies or takes too long, its one item fails,
and a new helper takes its place. If a helper is told to end, the new one does the item.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from pebble import ProcessExpired, ProcessPool

from legit_worker import parking, settings
from legit_worker.errors import InvalidInputError
from legit_worker.prep.guard import forbid_cuda

logger = logging.getLogger(__name__)

#: The most bytes of arguments that helpers hold, at work or queued. Further items wait in their tasks.
MAX_BYTES = 256 * 2**20

#: How a helper ends that was told to, together with its worker: by a signal to the whole process group or service. Then
#: nothing is wrong with its item. `SIGTERM` has a handler of pebble's, which gives its number.
TOLD_TO_END = (signal.SIGTERM, -signal.SIGTERM, -signal.SIGQUIT, -signal.SIGHUP)

#: What a task waits for, in words.
WHAT = "a helper process"


class Helpers:
    """Spawned processes, which start with their first work. They never had this process's memory or CUDA context."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds
        self._pool = self._new_pool()
        self._renewing = threading.Lock()
        #: The bytes of each item whose task waits for it, or has not gone on since it was done.
        self._at_work: dict[Future[Any], int] = {}

    def run(self, function: Callable[..., Any], *arguments: Any, size: int) -> Any:
        """Return `function(*arguments)`, from a helper; `size` is the arguments' bytes.

        Raises the function's errors, `InvalidInputError` if it ended its helper or took too long, and
        `BrokenProcessPool` if no helper can be started.
        """
        future = self._wait(function, arguments, size)
        while _was_told_to_end(future):
            future = self._wait(function, arguments, size)
        try:
            return future.result()
        except ProcessExpired as error:
            raise InvalidInputError(
                f"preparing the input ended its helper process (exit code {error.exitcode}): don't send it again"
            ) from None
        except FutureTimeoutError:
            raise InvalidInputError(
                f"preparing the input took over {self._seconds:g} s (LEGIT_WORKER_PREP_SECONDS), and was stopped"
            ) from None

    def _wait(self, function: Callable[..., Any], arguments: tuple[Any, ...], size: int) -> Future[Any]:
        """Wait for room and then for a helper. Returns a future that is done."""
        while (busy := self._busy()) and sum(busy.values()) + size > MAX_BYTES:
            parking.wait(next(iter(busy)), WHAT)
        future = self._schedule(function, arguments)
        self._at_work[future] = size
        try:
            parking.wait(future, WHAT, is_own=True)
        finally:
            del self._at_work[future]
            future.cancel()  # the task was revoked, or its time limit stopped it
        return future

    def _busy(self) -> dict[Future[Any], int]:
        """The bytes of each item that is not done. One that is would be waited for in vain: its task has to go on."""
        now = dict(self._at_work)  # in one step: other threads change it meanwhile
        return {future: size for future, size in now.items() if not future.done()}

    def _schedule(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[Any]:
        """Give an item to the helpers. If no helper could be started before, pebble's pool is of no more use."""
        pool = self._pool
        try:
            return pool.schedule(function, args=arguments, timeout=self._seconds)
        except RuntimeError as error:
            logger.warning("helper processes could not be started (%s), and are started anew", error)
        with self._renewing:
            if self._pool is pool:  # no other thread has done it meanwhile
                self._give_up()
                self._pool = self._new_pool()
        return self._pool.schedule(function, args=arguments, timeout=self._seconds)

    def _give_up(self) -> None:
        broken = BrokenProcessPool(
            f"no helper process could be started for a while (LEGIT_WORKER_PREP_PROCESSES={self._count}): if this "
            "comes again, look at the machine's memory and at its bound of processes"
        )
        for lost in self._busy():
            with suppress(InvalidStateError):  # it was done just now
                lost.set_exception(broken)

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._count, context=multiprocessing.get_context("spawn"), initializer=forbid_cuda
        )

    def close(self) -> None:
        """End them all."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


def _was_told_to_end(item: Future[Any]) -> bool:
    """Whether the item, which is over, lost its helper by nothing that it did."""
    error = item.exception()
    return isinstance(error, ProcessExpired) and error.exitcode in TOLD_TO_END


_making = threading.Lock()


def helpers() -> Helpers | None:
    """Return this process's helpers; None if `LEGIT_WORKER_PREP_PROCESSES` is 0."""
    with _making:  # or two threads that ask at once would each start some
        return _helpers()


@functools.cache
def _helpers() -> Helpers | None:
    chosen = settings.load()
    if not chosen.prep_processes or chosen.role == "prep":
        return None
    made = Helpers(chosen.prep_processes, chosen.prep_seconds)
    atexit.register(made.close)
    return made


def run(function: Callable[..., Any], *arguments: Any, size: int) -> Any:
    """Return `function(*arguments)`, from a helper if there are helpers. Raises the function's errors."""
    pool = helpers()
    return function(*arguments) if pool is None else pool.run(function, *arguments, size=size)


def _restart() -> None:
    """In a forked child, which has no threads that speak to the helpers, and must not use its parent's."""
    global _making
    _making = threading.Lock()
    _helpers.cache_clear()


os.register_at_fork(after_in_child=_restart)
