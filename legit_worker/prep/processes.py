"""Helper processes that prepare input beside the one worker, without CUDA.

In: a function and its arguments. Out: what it returns. A helper that dies, or takes too long, fails the one item that
it had, and another takes its place.
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

#: Bytes of arguments that helpers may have, at work or before them. What comes on top waits in its task.
MAX_BYTES = 256 * 2**20

#: What a task waits for, in words.
WHAT = "a helper process"


class Helpers:
    """Some processes, spawned at their first work. They never had this process's memory, nor its CUDA context."""

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._pool = ProcessPool(
            max_workers=count, context=multiprocessing.get_context("spawn"), initializer=forbid_cuda
        )
        #: Bytes of each item that is not done.
        self._at_work: dict[Future[Any], int] = {}

    def run(self, function: Callable[..., Any], *arguments: Any, size: int) -> Any:
        """`function(*arguments)`, in a helper; `size` is the arguments' bytes.

        Raises what the function raises, and `InvalidInputError` where it ended its helper or took too long.
        """
        while self._at_work and sum(self._at_work.values()) + size > MAX_BYTES:
            parking.wait(next(iter(self._at_work)), WHAT)
        future = self._pool.schedule(function, args=arguments, timeout=self._seconds)
        self._at_work[future] = size
        try:
            parking.wait(future, WHAT, is_own=True)
        finally:
            del self._at_work[future]
            future.cancel()  # type: ignore[no-untyped-call]  # of a task that was revoked, or stopped by its time limit
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
    """This process's helpers; None where `LEGIT_WORKER_PREP_PROCESSES` is 0."""
    chosen = settings.load()
    if not chosen.prep_processes or chosen.role == "prep":
        return None
    made = Helpers(chosen.prep_processes, chosen.prep_seconds)
    atexit.register(made.close)
    return made


def run(function: Callable[..., Any], *arguments: Any, size: int) -> Any:
    """In a helper where there are some, else right here. Raises what the function raises."""
    pool = helpers()
    return function(*arguments) if pool is None else pool.run(function, *arguments, size=size)


# A forked child has neither the threads that speak to the helpers nor a right to them.
os.register_at_fork(after_in_child=helpers.cache_clear)
