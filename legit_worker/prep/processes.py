"""Helper processes that prepare input beside the worker, without CUDA.

In: a function and its arguments. Out: the function's result. If a helper dies or takes too long, its one item fails,
and a new helper takes its place.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from legit_worker import parking, settings
from legit_worker.errors import InvalidInputError
from legit_worker.prep.guard import forbid_cuda

#: The most bytes of arguments that helpers hold, at work or queued. Further items wait in their tasks.
MAX_BYTES = 256 * 2**20

#: What a task waits for, in words.
WHAT = "a helper process"


class Helpers:
    """Spawned processes, which start with their first work. They never had this process's memory or CUDA context."""

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._pool = ProcessPool(
            max_workers=count, context=multiprocessing.get_context("spawn"), initializer=forbid_cuda
        )
        #: The bytes of each item that is not done.
        self._at_work: dict[Future[Any], int] = {}

    def run(self, function: Callable[..., Any], *arguments: Any, size: int) -> Any:
        """Return `function(*arguments)`, from a helper; `size` is the arguments' bytes.

        Raises the function's errors, and `InvalidInputError` if it ended its helper or took too long.
        """
        while self._at_work and sum(self._at_work.values()) + size > MAX_BYTES:
            parking.wait(next(iter(self._at_work)), WHAT)
        future = self._pool.schedule(function, args=arguments, timeout=self._seconds)
        self._at_work[future] = size
        try:
            parking.wait(future, WHAT, is_own=True)
        finally:
            del self._at_work[future]
            future.cancel()  # type: ignore[no-untyped-call]  # the task was revoked, or its time limit stopped it
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

    def close(self) -> None:
        """End them all."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


@functools.cache
def helpers() -> Helpers | None:
    """Return this process's helpers; None if `LEGIT_WORKER_PREP_PROCESSES` is 0."""
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


# A forked child has no threads that speak to the helpers, and must not use its parent's.
os.register_at_fork(after_in_child=helpers.cache_clear)
