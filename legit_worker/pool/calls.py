"""What a task asks of a model, while it waits for that.

In: items, chunk by chunk, from the task. Out: for each chunk a future, with one output per item or the first error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from celery.exceptions import WorkerShutdown, WorkerTerminate
from greenlet import GreenletExit

from legit_worker.batching.fairness import Item
from legit_worker.errors import DeviceLostError
from legit_worker.pool.clock import Clock
from legit_worker.tracing import Asker

#: What ends the worker or a task, raised wherever the thread is: by Celery's handlers of signals, or by this pool. Any
#: other exception out of a model's method is the model's error.
ENDS = (GreenletExit, WorkerShutdown, WorkerTerminate)


@contextmanager
def trusted() -> Iterator[None]:
    """Around this package's own code between two tasks, which holds batches. Makes a `DeviceLostError` of an error.

    Nobody knows what still works after it. The worker would wait for ever for tasks that nothing goes on with.
    """
    try:
        yield
    except (DeviceLostError, *ENDS):
        raise
    except Exception as error:
        raise DeviceLostError(f"legit_worker failed between two tasks, by a fault of its own: {error!r}") from error


@dataclass(eq=False, kw_only=True, slots=True)
class Call:
    """One `encode`, `predict` or `map`: the unit of fairness, however many chunks it has. Lives on the main thread."""

    #: The app the task works for, `""` if none is configured.
    app: str
    #: The task's: told which batches hold its items.
    clock: Clock = field(default_factory=Clock)
    #: The task's span, if it has one.
    asker: Asker | None = None
    #: Chunks so far.
    chunks: int = 0
    #: Kept by `FairQueue`: how far this call's items reach in its app's virtual time, and how many of them wait.
    finish_tag: float = 0.0
    waiting: int = 0


class Chunk:
    """Items of one call that the engine has, in one or more batches. Lives on the main thread."""

    __slots__ = ("_left", "alias", "call", "done", "is_over", "items")

    def __init__(self, call: Call, alias: str) -> None:
        self.call = call
        #: The model's.
        self.alias = alias
        #: One output per item, in order, or the error of the first item that failed.
        self.done: Future[list[Any]] = Future()
        #: Nobody waits for it any more: it is done, or was dropped.
        self.is_over = False
        #: None when it is over: items know their chunk, and a cycle would keep both for the collector.
        self.items: Sequence[Item] = ()
        self._left = 0

    def __repr__(self) -> str:
        return f"<Chunk for {self.call.app or 'no app'}: {self._left} of {len(self.items)} items to be computed>"

    def begin(self, items: Sequence[Item]) -> None:
        """Note what it is made of."""
        self.items, self._left = items, len(items)

    def deliver(self, item: Item, output: Any, postprocess: Callable[[Any], Any]) -> None:
        """One output came out of a batch. Finished at once, since an output may hold on to its whole batch.

        Raises what ends the worker.
        """
        if self.is_over:
            return
        try:
            item.output = postprocess(output)
        except ENDS:
            raise
        except BaseException as error:
            self.fail(error)
            return
        self._left -= 1
        if not self._left:
            outputs = [item.output for item in self.items]
            self.give_up()
            self.done.set_result(outputs)

    def fail(self, error: BaseException) -> None:
        """One item could not be computed. The first such error is the chunk's; whoever waits drops the rest."""
        if not self.is_over:
            self.is_over = True
            self.done.set_exception(error)

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        self.is_over, self.items = True, ()
