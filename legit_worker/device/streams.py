"""Batches on a CPU beside the main thread. A stream is a thread that computes one batch at a time, on its own cores.

In: functions that compute batches without the interpreter lock. Out: a launch for each, done when its stream is.

While the main thread works for tasks, torch's other threads wait: each of a batch's steps needs them all. With a batch
for each core and one thread for each batch, nobody waits for anybody.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import thread_time
from typing import Any

from legit_worker.device import in_flight
from legit_worker.device.devices import Launch
from legit_worker.device.imported import imported

#: The most streams. With more cores, each stream has several.
MOST = 4


@dataclass(eq=False, kw_only=True)
class StreamLaunch(Launch):
    """A batch that a stream computes."""

    compute: Callable[[], Any] | None
    #: Called on the stream's thread, when the batch begins and when it is over.
    on_begin: Callable[[], None]
    on_done: Callable[[], None]
    _over: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Wait without the interpreter lock."""
        self._over.wait()

    def run(self, share: float) -> None:
        """Compute it on this thread, which has this share of the device."""
        assert self.compute is not None
        self.on_begin()
        start = thread_time()
        try:
            self.outputs = self.compute()
        except Exception as error:
            self.error = error
        # Of the processor, and not of the clock: the main thread has some of this time, too.
        seconds = thread_time() - start
        if isinstance(self.outputs, Launch):  # other threads computed it, and this one waited
            self.outputs, seconds = self.outputs.outputs, self.outputs.seconds
        self.seconds = seconds * share
        self.compute = None
        self.is_done = True
        self.on_done()
        self._over.set()
        in_flight.landed(self)


@functools.cache
def _keep_precision() -> None:
    """Let a task set the precision of float32 products only between two batches: torch has one for all threads.

    When the main thread hands a batch over, no task's setting is in force (`device.modes`).
    """
    import torch

    set_precision = torch.set_float32_matmul_precision

    @functools.wraps(set_precision)
    def set_between_batches(precision: str) -> None:
        in_flight.wait(StreamLaunch)
        set_precision(precision)

    torch.set_float32_matmul_precision = set_between_batches


#: Whether this process has a pool that hands batches over.
_has_pool = False


def division() -> tuple[int, int]:
    """How many streams torch's threads make, and the threads of each; 0 streams without a pool or with one thread."""
    import torch

    threads = torch.get_num_threads()
    if not _has_pool or threads == 1 or importlib.util.find_spec("threadpoolctl") is None:
        return 0, threads
    count = min(threads, MOST)
    return count, threads // count


class Streams:
    """The streams of one pool. The main thread hands batches over. The threads start with the first one."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        """`wake` is called on a stream's thread, when a batch is over."""
        global _has_pool
        _has_pool = True
        self._wake = wake
        self._launches: SimpleQueue[StreamLaunch] = SimpleQueue()
        #: How many there are, and the threads of torch in each. 0: batches run on the main thread alone.
        self.count, self._threads = 0, 1
        self._are_counted = self._are_running = False

    def __repr__(self) -> str:
        return f"<{self.count} Streams with {self._threads} threads each>"

    def are_open(self) -> bool:
        """Whether batches can be handed over: torch computes on several cores, and streams can have fewer threads."""
        if not self._are_counted and imported("torch") is not None:
            self._are_counted = True
            self.count, self._threads = division()
        return self.count > 0

    def launch(self, compute: Callable[[], Any], on_begin: Callable[[], None], on_done: Callable[[], None]) -> Launch:
        """Hand a batch over. Raises `RuntimeError` if no thread can start."""
        launch = StreamLaunch(
            outputs=None, seconds=0.0, is_done=False, compute=compute, on_begin=on_begin, on_done=on_done
        )
        self._start()
        with in_flight.handing_over(launch):
            self._launches.put(launch)
        return launch

    def _start(self) -> None:
        if self._are_running:
            return
        _keep_precision()
        for number in range(self.count):
            # Daemons: when the worker has ended, nobody needs the batch.
            threading.Thread(target=self._run, name=f"legit-stream-{number + 1}", daemon=True).start()
            self._are_running = True  # one is enough

    def _run(self) -> None:
        with suppress(Exception):  # then each batch has all cores
            self._take_threads()
        while True:
            self._launches.get().run(1 / self.count)
            self._wake()

    def _take_threads(self) -> None:
        """Have torch compute on this many threads, if this thread asks it. `torch.set_num_threads` is the process's."""
        import torch
        from threadpoolctl import ThreadpoolController

        torch.get_num_threads()  # torch sets this thread's number at its first question
        ThreadpoolController().select(user_api="openmp").limit(limits=self._threads)
