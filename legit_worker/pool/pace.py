"""When to fetch more tasks, and when to compute.

In: arrivals, and how much work waits. Out: whether to run a batch now. Between two batches the hub does its own work:
messages, acks, heartbeats, remote control.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic

from legit_worker.batching.sizing import LAUNCH_SHARE, TARGET_SHARE

#: Seconds to listen for one more task before a batch, when the last ones came singly. A broker on this machine
#: answers in a third of it; a lone task waits no longer than this.
GLANCE = 0.0004

#: A task that arrives within this many seconds of a batch's end had been waiting for it.
AT_ONCE = 0.002

#: The same, when a task stood waiting as soon as the last batch was done, or a broker's answer is on its way and the
#: last tasks did not come singly. A broker across a network may need this long to give the next one.
LOOK = 0.010

#: The most batches before it is tried again whether such a look pays. One client that waits for each answer before it
#: sends the next task may be as quick as a task that stood waiting, and each look would be time that it loses.
MOST_SKIPPED = 64

#: The most seconds between two batches that fetching may take, so that first answers don't wait for a full window.
MAX_FETCH_SECONDS = 0.5

#: With this many seconds of work waiting beside the next batch, no more is fetched: batches pack as well as they ever
#: will, and what is left in the queue is left for other workers.
ENOUGH_SECONDS = 2.0

#: How long one look may block the hub's timers.
MAX_LOOK = 0.05

#: Seconds of a launch that is worth `LAUNCH_SHARE` of them to listen for company. A quicker one gets a glance.
DEAR_LAUNCH = 0.05


class Pace:
    """Decides, each time the hub comes round, whether to look for more tasks first. Lives on the main thread.

    Fetching fills the window, and a full window packs into even batches; but it must not take longer than computing
    what was fetched, or tasks wait for nothing. It goes on for longer if tasks stand waiting and a batch takes as long
    for one item as for many, as on a GPU: until the launch is a small part of the time. With `max_delay` set by the
    user, that bounds the wait instead. A part of the user's target latency bounds both.
    """

    def __init__(self, max_delay: float | None, target_latency: float | None = None) -> None:
        most = inf if target_latency is None else TARGET_SHARE * target_latency
        self._max_delay = None if max_delay is None else min(max_delay, most)
        self._max_fetch = min(MAX_FETCH_SECONDS, most)
        self._batch_done_at = 0.0
        #: When this round of fetching began; None until the first look after a batch.
        self._began: float | None = None
        self._arrived = False
        #: Tasks that came since the last batch, and before it since the one before.
        self._came = self._came_before = 0
        #: A task stood waiting when the last batch was done, and looking longer since has paid.
        self._backlog = False
        #: Looks in a row that found nobody, as batches to skip after the next such one; and batches still to skip.
        self._in_vain = self._skips = 0

    def task_arrived(self) -> None:
        """The hub handed over a task."""
        self._arrived = True
        self._came += 1

    def batch_done(self) -> None:
        """The engine ran a batch."""
        self._batch_done_at, self._began = monotonic(), None
        if self._came:
            self._came, self._came_before = 0, self._came

    def should_compute(
        self,
        *,
        waiting_seconds: float,
        surplus_seconds: float,
        launch_seconds: float,
        full: Callable[[], bool],
        coming: bool | None = None,
        look: Callable[[float], bool],
    ) -> bool:
        """Whether to run a batch now; else let the hub go round once more.

        `waiting_seconds` is how long all that waits would take to compute, `surplus_seconds` the same beside the next
        batches, and `launch_seconds` how long the next batch takes at least. `full` says whether more tasks would not
        make the next batch larger. `coming` is what `owners.is_more_coming` says. `look(seconds)` listens that long and
        says whether the hub has something to do.
        """
        # Long, for its arguments and what they mean.
        now = monotonic()
        arrived, self._arrived = self._arrived, False
        if self._began is None:
            self._began = now
            if arrived and now - self._batch_done_at < AT_ONCE and not self._backlog:
                self._backlog, self._skips = self._skips == 0, max(0, self._skips - 1)
        elapsed = now - self._began
        if self._max_delay is not None:
            return self._is_over(self._max_delay - elapsed, arrived, full, look)
        if surplus_seconds > ENOUGH_SECONDS:
            return True
        patience = self._patience(elapsed, waiting_seconds, launch_seconds, full, coming)
        if patience is None:
            return True
        if arrived and patience > 0:  # go round first: the hub asks the broker for the next task only then
            return False
        found = look(patience)
        if coming is None and self._backlog and patience > _glance(launch_seconds):
            self._learn(has_paid=found)
        return not found

    def _learn(self, *, has_paid: bool) -> None:
        """A look for a task that stands waiting is over."""
        self._backlog = has_paid
        self._in_vain = 0 if has_paid else min(MOST_SKIPPED, max(1, 2 * self._in_vain))
        self._skips = self._in_vain

    def _patience(
        self,
        elapsed: float,
        waiting_seconds: float,
        launch_seconds: float,
        full: Callable[[], bool],
        coming: bool | None,
    ) -> float | None:
        """Seconds to listen for one more task; None if enough time went into fetching."""
        more = self._backlog if coming is None else coming and max(self._came, self._came_before) > 1
        patience = 0.0 if coming is False and launch_seconds < DEAR_LAUNCH else _glance(launch_seconds)
        if more:
            patience = max(patience, min(LOOK, waiting_seconds))
        if elapsed <= min(self._max_fetch, waiting_seconds):
            return patience
        if more and elapsed < min(self._max_fetch, launch_seconds / LAUNCH_SHARE) and not full():
            return patience
        return None

    @staticmethod
    def _is_over(left: float, arrived: bool, full: Callable[[], bool], look: Callable[[float], bool]) -> bool:
        """Whether the delay that the user chose is over. If not, listen for a part of the time that is left."""
        if left <= 0 or full():
            return True
        if not arrived:
            look(min(left, MAX_LOOK))
        return False


def _glance(launch_seconds: float) -> float:
    """Seconds to listen when nobody is known to wait."""
    return min(MAX_LOOK, launch_seconds * LAUNCH_SHARE) if launch_seconds >= DEAR_LAUNCH else GLANCE
