"""The one place that advances tasks: it starts them, computes their batches, and resumes them.

In: fibers that may begin or go on, and what ends one that waits. Out: control to one fiber at a time. The hub calls
`turn` between two messages, and the shutdown calls the same `turn` until nothing runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any, NoReturn

from greenlet import GreenletExit

from legit_worker.broker.refusals import give_up_request
from legit_worker.errors import DeviceLostError
from legit_worker.pool import own, sql, turns
from legit_worker.pool.backlog import AppLimits, Backlog
from legit_worker.pool.calls import trusted
from legit_worker.pool.engine import Engine
from legit_worker.pool.fibers import Fiber, Phase
from legit_worker.pool.hooks import is_of_one_message
from legit_worker.pool.intake import Intake
from legit_worker.pool.pace import Pace
from legit_worker.pool.running import Running
from legit_worker.pool.strays import Strays
from legit_worker.pool.wakeup import Wakeup
from legit_worker.pool.watcher import Turn, Watcher

#: Seconds after which a turn resumes no more of the tasks that gave way: messages and heartbeats come first.
FULL_TURN = 0.02

#: Seconds that messages which came as a group may begin tasks before the next turn: those whose batch is done go on
#: first. Long enough for a full batch of tasks whose own code takes some milliseconds each.
MOST_BEGINNING = 0.25


class Loop:
    """One pool's. Lives on the main thread, except for `wake` and `note_lost`. Owns the backlog and who is ready."""

    def __init__(
        self,
        *,
        engine: Engine,
        running: Running,
        wakeup: Wakeup,
        watcher: Watcher,
        pace: Pace,
        intake: Intake,
        app_limits: AppLimits | None = None,
        strays: Strays,
        review_models: Callable[[], None],
        ended: Callable[[Fiber], None],
        comes_again: Callable[[Any, Exception], bool] = lambda request, error: False,
        ends_at: Callable[[], float] = lambda: inf,
        cancel: Callable[[], None] = lambda: None,
    ) -> None:
        """`review_models` loads and evicts what can be by now; `ended` hears of each task that is over;
        `comes_again` is `timed.comes_again`; `ends_at` tells when a shutdown lets no task go on, and `cancel` then
        cancels all."""
        self._engine = engine
        self._running = running
        self._wakeup = wakeup
        self._watcher = watcher
        self._pace = pace
        self._intake = intake
        self._review_models = review_models
        self._ended = ended
        self._strays = strays
        self._comes_again = comes_again
        self._ends_at = ends_at
        self._cancel = cancel
        #: Whether this package's code between the tasks runs: a batch, or a decision.
        self.is_turning = False
        #: What lets an app's tasks begin.
        self.app_limits = app_limits or AppLimits({}, running)
        #: Tasks that came and have not begun.
        self.backlog = Backlog(self.app_limits.has)
        self._ready: deque[Fiber] = deque()
        # Seconds that the tasks took which began since the last turn.
        self._began_for = 0.0
        # Tasks that must be ended or warned once their batch is over.
        self._due: dict[Fiber, None] = {}
        #: The device is gone for good.
        self.lost: DeviceLostError | None = None
        self._is_loss_told = False

    def __repr__(self) -> str:
        return f"<Loop: {len(self._running)} running, {len(self._ready)} ready, {len(self.backlog)} not started>"

    def admit(self, fiber: Fiber) -> None:
        """Start a task that came, or keep it until it may start."""
        if self.app_limits.has(fiber.app):  # behind the app's others
            self.backlog.append(fiber)
            self._begin()
        elif self._intake.may_start() and self._may_begin(fiber):
            self.start(fiber)
        else:
            self.backlog.append(fiber)

    def _begin(self) -> None:
        """Begin tasks that came, as long as there is room, and time before the next turn."""
        while not self.is_overdue and self._intake.may_start():
            first = self.backlog.take(self._may_begin)
            if first is None:
                return
            self.start(first)

    def _may_begin(self, fiber: Fiber) -> bool:
        return (fiber.acks_late or self._intake.may_start_early()) and self.app_limits.may_begin(fiber)

    def start(self, fiber: Fiber) -> None:
        """Run a task until it parks for the first time, or ends."""
        self._pace.task_arrived()
        self.app_limits.begun(fiber)
        self._running.add(fiber)
        self._watcher.follow(fiber)
        try:
            self._switch_to(fiber)
        finally:
            self._began_for += fiber.ran_seconds
        self._wakeup.set()

    def wake(self, fiber: Fiber) -> None:
        """Have a parked fiber resumed at the next turn. Called by any thread."""
        if not fiber.woken:
            fiber.woken = True
            self._ready.append(fiber)
        self._wakeup.set()

    def look_again(self) -> None:
        """Look again whether a task may begin: nothing in a turn tells when a doubt about messages is over.

        Nor when the broker has heard how many may run beside suspects.
        """
        if self.backlog:
            self._wakeup.set()

    def note_lost(self, error: DeviceLostError) -> None:
        """The device is gone. The next turn raises that, once: a fiber can't end other fibers."""
        self.lost = self.lost or error
        self._wakeup.set()

    def send_back(self, fiber: Fiber, error: DeviceLostError) -> NoReturn:
        """End a task whose device is gone: its message goes back, or, if it was acked early, the task fails."""
        self.note_lost(error)
        if fiber.acks_late:
            raise GreenletExit from error
        raise DeviceLostError(*error.args) from error

    @property
    def is_overdue(self) -> bool:
        """Whether tasks have begun for `MOST_BEGINNING` seconds: the next turn should come before others begin."""
        return self._began_for >= MOST_BEGINNING

    @property
    def has_work(self) -> bool:
        """Whether a turn would advance anything now."""
        return bool(self._ready) or self._engine.can_step

    def turn(self, should_compute: Callable[[], bool]) -> None:
        """Advance all that can be by now, and compute one batch if `should_compute`.

        Raises `DeviceLostError`, and what a lost connection raises in Celery's own callbacks, as in solo.
        """
        self.is_turning, self._began_for = True, 0.0
        try:
            self._turn(should_compute)
        finally:
            self.is_turning = False
            if self.is_overdue:  # which the next turn ends, and messages wait for that
                self._wakeup.set()

    def _turn(self, should_compute: Callable[[], bool]) -> None:
        with trusted():
            self._review_models()
        if self.lost is not None and not self._is_loss_told:
            self._is_loss_told = True
            raise self.lost
        if self._engine.collect():
            self._pace.batch_done()
        self._end_due()
        self.resume_ready()
        if self._engine.can_step and should_compute():
            self._engine.step()
            self.resume_ready()
            self._pace.batch_done()

    def wait(self, seconds: float) -> None:
        """Sleep until something happens: all that runs waits for a load, the device, or somebody else."""
        self._wakeup.wait(seconds)
        self._wakeup.clear()
        turns.look()

    def resume_ready(self) -> None:
        """Let those go on whose waiting is over, then begin others in the place of those that ended.

        Once a soft or a cold shutdown lets no task go on, only those go on whose own code is over.
        """
        now = monotonic()
        is_over = now >= self._ends_at()
        if is_over:
            self._cancel()
        self._resume_all(self._ready, until=now + FULL_TURN)
        if is_over:
            return
        self._begin()

    def _resume_all(self, ready: deque[Fiber], *, until: float) -> None:
        """Resume each fiber that is ready now. From `until` on, those that only gave way are the next turn's first.

        So are those whose own code is yet to begin, once others' have begun for long.
        """
        later: list[Fiber] = []
        try:
            for _ in range(len(ready)):
                fiber = ready.popleft()
                now, is_new = monotonic(), fiber.phase is Phase.NEW
                if (fiber.gives_way and now > until) or (is_new and self.is_overdue) or self._is_over_for(fiber, now):
                    later.append(fiber)
                elif not fiber.dead:
                    self._switch_to(fiber)
                    self._began_for += (monotonic() - now) * is_new
        finally:  # the switch may raise
            ready.extendleft(reversed(later))

    def _is_over_for(self, fiber: Fiber, now: float) -> bool:
        return now >= self._ends_at() and fiber.phase is not Phase.ENDING

    def _end_due(self) -> None:
        """Raise what is due in the tasks that wait. One whose batch is being computed is told after that."""
        self._due |= dict.fromkeys(self._watcher.take_due())
        for fiber in list(self._due):
            error = None if fiber.waits_for is None else fiber.due(fiber.waits_for)
            if error is not None or not fiber.is_due:
                del self._due[fiber]
            if error is not None:  # the switch may raise, and the rest stays for the next turn
                self._switch_to(fiber, error)

    def _switch_to(self, fiber: Fiber, error: BaseException | None = None) -> None:
        """Run a fiber until it parks or ends.

        What a server's or a network's failure raises in Celery's own callbacks goes up to the worker, as in solo. A
        message that they can't deal with does not end the worker, nor does what the project's own `Request` raises, or
        a signal's handler.
        """
        sql.watch()
        turn = self._watcher.turn = Turn(fiber=fiber, since=monotonic())
        try:
            fiber.resume(error)
        except Exception as raised:
            if not self._outlives(fiber, raised):
                raise
        finally:
            self._watcher.turn = None
            fiber.ran_seconds += monotonic() - turn.since
            if fiber.dead:
                self.forget(fiber)
        self._refill()

    def _refill(self) -> None:
        """Let streams have their next batches before the next task goes on."""
        try:
            if self._engine.refill():
                self._pace.batch_done()
        except DeviceLostError as error:  # which the next turn tells
            self.note_lost(error)

    def _outlives(self, fiber: Fiber, error: Exception) -> bool:
        """See to a message that nobody would come back to. False if the error goes up to the worker."""
        if own.is_stray(error, f"Celery's code around {fiber.name}"):
            if not fiber.dead:  # the signal came just before the switch, or just after it
                self.wake(fiber)
            elif fiber.request is not None:
                self._strays.give_back(fiber.request, error)
        elif is_of_one_message(fiber.request, error):
            give_up_request(fiber.request, error)
        else:
            return self._comes_again(fiber.request, error)
        return True

    def forget(self, fiber: Fiber) -> None:
        """A task is over, or nobody will resume it any more."""
        self._running.discard(fiber)
        self._ended(fiber)
