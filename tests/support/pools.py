"""A loop without Celery, broker, model, or hub: the parts of a pool, over an engine that a test plays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from jobs import job

from legit_worker import parking
from legit_worker.errors import DeviceLostError
from legit_worker.pool.backlog import AppLimits
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.host import FiberHost
from legit_worker.pool.intake import Intake
from legit_worker.pool.loop import Loop
from legit_worker.pool.pace import Pace
from legit_worker.pool.running import Running
from legit_worker.pool.share import Share
from legit_worker.pool.strays import Strays
from legit_worker.pool.wakeup import Wakeup
from legit_worker.pool.watcher import Watcher
from legit_worker.settings import AppSettings


class PlayedEngine:
    """Computes one batch of all that was asked for at each step."""

    def __init__(self) -> None:
        self.asked: list[Future[str]] = []
        self.batches: list[int] = []
        self.error: Exception | None = None
        self.is_forgotten = False
        #: Whether a batch goes on that nobody waits for.
        self.is_computing = False

    def call(self) -> str:
        """What a task does: ask, and wait for the batch."""
        done: Future[str] = Future()
        self.asked.append(done)
        parking.wait(done, "model played", drive=self.step)
        return done.result()

    @property
    def can_step(self) -> bool:
        """Whether somebody asked."""
        return bool(self.asked)

    def step(self) -> bool:
        """Answer all who asked. Raises what the test wants."""
        if self.error is not None:
            raise self.error
        asked, self.asked = self.asked, []
        self.batches.append(len(asked))
        for done in asked:
            done.set_result("an answer")
        return True

    def collect(self) -> bool:
        """Nothing is ever in flight."""
        return False

    def refill(self) -> bool:
        """There are no lanes."""
        return False

    def forget(self) -> None:
        """Nobody gets an answer any more."""
        self.asked.clear()
        self.is_forgotten = True

    def wait(self, seconds: float) -> None:
        """Nothing to wait for."""


class PlayedPool:
    """A loop and what it needs. `window` bounds the tasks that run, and `apps` have limits."""

    def __init__(self, window: int = 100, apps: Mapping[str, AppSettings] | None = None) -> None:
        self.engine: Any = PlayedEngine()
        self.running = Running()
        self.wakeup = Wakeup()
        self.watcher = Watcher(running=self.running, wake=self.wakeup.set, stall_seconds=60)
        share = Share(lambda more: None, calls=lambda: 0, max_seconds=1000)
        self.is_ending = False
        self.intake = Intake(
            window,
            self.running,
            share,
            waiting=lambda: len(self.loop.backlog),
            aside=lambda: 0,
            is_ending=lambda: self.is_ending,
        )
        self.ended: list[str] = []
        #: Requests that a timer started, and whose ends could not be stored.
        self.timed: list[Any] = []
        self.loop = Loop(
            engine=self.engine,
            running=self.running,
            wakeup=self.wakeup,
            watcher=self.watcher,
            pace=Pace(None),
            intake=self.intake,
            app_limits=AppLimits(apps or {}, self.running),
            strays=Strays(5),
            comes_again=lambda request, error: not self.timed.append(request),
            review_models=lambda: None,
            ended=lambda fiber: self.ended.append(fiber.name),
        )
        self.results: list[Any] = []
        #: Celery's callback.
        self.told: Callable[[Any], Any] = self.results.append
        parking.use(FiberHost(self.loop, self.engine, self.running, is_inline=False))

    def send(self, body: Callable[[], Any], name: str = "task", **options: Any) -> Fiber:
        """A task comes."""
        fiber = Fiber(
            job(body, callback=lambda result: self.told(result)).run, app="", name=name, wake=self.loop.wake, **options
        )
        self.loop.admit(fiber)
        return fiber

    def turn(self) -> None:
        """One turn, which computes a batch if there is one."""
        self.loop.turn(lambda: True)

    def run(self) -> None:
        """Turns, until nothing is left to do."""
        while self.loop.has_work:
            self.turn()


LOST = DeviceLostError("the device is gone")
