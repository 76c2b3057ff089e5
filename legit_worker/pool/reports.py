"""What a worker's log says about the pool: one line at its start, one a minute while it is busy, and at its end which
tasks are still finishing.

In: the settings, tasks that end, and the engine's counters. Out: INFO lines. An idle minute logs nothing.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from math import ceil, inf
from time import monotonic

from celery import Celery

from legit_worker import settings
from legit_worker.device import cuda, vram
from legit_worker.pool.counters import Counters

logger = logging.getLogger(__name__)

#: The most early-acked tasks that the warning names.
NAMED = 3

#: The warning at the start. A kill never loses a task that has not started.
EARLY_ACKS = (
    "Some tasks are acked before they run (%s: %d in all). A kill of this worker loses those that have started, up to "
    "%d, and nobody is told; no more of them run at once. Set acks_late=True for each that may run twice."
)

#: Seconds between two lines of a busy worker.
BUSY_SECONDS = 60.0

#: Seconds between two lines of a worker that waits for its last tasks.
FINISHING_SECONDS = 10.0

#: The most tasks whose waits are kept until the next line: enough for a percentile, in 100 KiB.
KEPT = 4096

#: The number of last tasks among which `inspect stats` shows the worst wait: about two full windows.
RECENT = 2048


def started(app: Celery, chosen: settings.Settings, window: int, messages: str) -> None:
    """Log the line of a worker that is ready. `messages` says how messages come."""
    import legit_worker

    acks = "late" if app.conf.task_acks_late else "early"
    logger.info(
        "legit_worker %s on %s: %s; window %d, acks %s, messages %s; settings: %s",
        legit_worker.__version__,
        _device(chosen.device),
        _models(chosen.models),
        window,
        acks,
        messages,
        settings.listed_changes(chosen),
    )


def with_others(messages: int, seconds: float, lease: float) -> None:
    """Log at the start that workers hold messages of this broker: a killed worker's messages come back only later."""
    if messages:
        logger.info(
            "workers hold %d messages of this broker; if one of them was killed, its messages come back within %.0f s "
            "(LEGIT_WORKER_LEASE_SECONDS), and a stock worker's messages %.0f s after it took them "
            "(broker_transport_options: visibility_timeout)",
            *(messages, lease, seconds),
        )


def early_acks(app: Celery, most: int) -> None:
    """Warn of tasks that a kill loses: solo loses one of them, and this pool up to `most`."""
    tasks = app.tasks.items()
    early = sorted(name for name, task in tasks if not task.acks_late and not name.startswith("celery."))
    if early:
        logger.warning(EARLY_ACKS, ", ".join(early[:NAMED]), len(early), most)


def _device(chosen: str) -> str:
    """Describe the device without torch, whose import takes seconds. The first load decides what `auto` is."""
    if not cuda.may_be_gpu(chosen):
        return chosen
    try:
        gpu = cuda.gpu(chosen)
    except vram.VramUnknownError:
        return f"device {chosen} (NVML tells of no GPU)"
    return f"{gpu.name} ({chosen})" if gpu else "the CPU"


def _models(models: Mapping[str, settings.ModelSettings]) -> str:
    if not models:
        return "no model (set LEGIT_WORKER_MODELS__<ALIAS>__PATH)"
    return ", ".join(f"{alias} ({model.kind}{', pinned' if model.pin else ''})" for alias, model in models.items())


class Reports:
    """One pool's lines. Lives on the main thread.

    `counters` returns the engine's counters, and `loads` the number of loads so far.
    """

    def __init__(self, counters: Callable[[], Counters], loads: Callable[[], int]) -> None:
        self._counters = counters
        self._loads = loads
        self._tasks = 0
        #: The seconds that each task waited: for company, for its turn, for a model to load.
        self._waits: deque[float] = deque(maxlen=KEPT)
        #: The same of the last tasks, and their sum over all tasks.
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._waited = 0.0
        self._before = (0, 0, 0)
        self._since = monotonic()
        self._told_at = -inf

    def ended(self, waited: float) -> None:
        """Note that a task is over, and waited for these seconds."""
        self._tasks += 1
        self._waited += waited
        self._waits.append(waited)
        self._recent.append(waited)

    def report(self) -> dict[str, float]:
        """Return the waits for `inspect stats`, in seconds."""
        worst = max(self._recent, default=0.0)
        return {"waited_seconds": round(self._waited, 3), "worst_recent_wait_seconds": round(worst, 3)}

    def busy(self, running: int, waiting: int) -> None:
        """Log the line of a minute, unless the worker was idle."""
        now, counted = monotonic(), self._counters()
        totals = (counted.batches, counted.items, self._loads())
        batches, items, loads = (after - before for after, before in zip(totals, self._before, strict=True))
        tasks, elapsed = self._tasks, max(now - self._since, 0.001)
        if tasks or batches or loads or running:
            logger.info(
                "last %.0f s: %d tasks (%.1f/s), 95 %% of them waited at most %.2f s; "
                "%d batches of %.1f items, %d loads; %d running, %d not started",
                *(elapsed, tasks, tasks / elapsed, _most(self._waits)),
                *(batches, items / max(batches, 1), loads, running, waiting),
            )
        self._before, self._since, self._tasks = totals, now, 0
        self._waits.clear()

    def finishing(self, waits: Collection[str | None]) -> None:
        """Log which tasks keep the worker from ending, now and then. `waits`: what each task waits for."""
        if waits and monotonic() - self._told_at > FINISHING_SECONDS:
            self._told_at = monotonic()
            counted = Counter(f"waiting for {what}" if what else "running" for what in waits)
            kinds = ", ".join(f"{count} {what}" for what, count in counted.most_common())
            logger.info("%d tasks still finishing: %s", len(waits), kinds)


def _most(seconds: Collection[float]) -> float:
    """Return the 95th percentile, by nearest rank; 0 if there are no seconds."""
    return sorted(seconds)[ceil(len(seconds) * 0.95) - 1] if seconds else 0.0
