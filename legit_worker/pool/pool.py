"""Celery's face of this project: the pool class that a worker runs its tasks in.

In: tasks, from the worker's consumer, by `apply_async`. Out: Celery's callbacks, when each is accepted and when it
is done, as the solo pool would have called them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any

from celery import signals
from celery.concurrency.base import apply_target
from celery.concurrency.solo import TaskPool as SoloPool
from celery.utils import threads

from legit_worker import control, parking, quickjson, settings
from legit_worker.broker.ledger import Worker
from legit_worker.broker.owners import in_doubt, is_more_there, join
from legit_worker.broker.patience import is_answer_awaited
from legit_worker.broker.redis import held_by_workers, reserve_messages, taking
from legit_worker.broker.refusals import keep_discarded, refuse_unreadable
from legit_worker.device.streams import Streams
from legit_worker.errors import DeviceLostError
from legit_worker.models import handle, requirements
from legit_worker.models.quiet import quiet_libraries
from legit_worker.models.registry import default_registry
from legit_worker.pool import fibers, figures, limits, looks, own, reports, sql, timed, turns
from legit_worker.pool.adoption import Adoption
from legit_worker.pool.backlog import AppLimits
from legit_worker.pool.computing import Computing
from legit_worker.pool.ending import Ending
from legit_worker.pool.ends import end_in_fibers, ignore_late_revokes
from legit_worker.pool.engine import Engine
from legit_worker.pool.entrance import Entrance
from legit_worker.pool.fetching import Fetching
from legit_worker.pool.fibers import Fiber, Phase, fiber_of
from legit_worker.pool.flights import Waiter
from legit_worker.pool.host import FiberHost
from legit_worker.pool.intake import EARLY_WINDOW, Intake, window
from legit_worker.pool.jobs import Job
from legit_worker.pool.looks import Looks
from legit_worker.pool.loop import Loop
from legit_worker.pool.pace import Pace
from legit_worker.pool.reports import Reports
from legit_worker.pool.running import Running, tags_of
from legit_worker.pool.share import Share
from legit_worker.pool.softly import SoftShutdown
from legit_worker.pool.starting import load_pinned, prepare_process
from legit_worker.pool.storing import store_patiently
from legit_worker.pool.strays import Strays
from legit_worker.pool.suspects import VOUCH_SECONDS, Suspects
from legit_worker.pool.telling import are_seen, show_quickly, tell_own_time
from legit_worker.pool.wakeup import Wakeup
from legit_worker.pool.watcher import Watcher
from legit_worker.results.backend import ask_early, store_in_groups
from legit_worker.routing.backend import Routing


class ModelPool(SoloPool):
    """A solo pool whose tasks park at model calls. Lives on the worker's main thread; wires its parts together.

    Never runs two pieces of task code at once, and never switches tasks except at a model call.
    """

    # More than twenty methods: a dozen are those that Celery calls.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if threads.LocalStack is threads._FastLocalStack:
            raise SystemExit("legit_worker: USE_FAST_LOCALS gives all tasks one request; unset it")
        self._settings = settings.load_or_exit()
        # Here, and not in `install()` alone, since `-P custom` needs no `install()`.
        requirements.check_or_exit(self._settings)
        control.register()
        quiet_libraries()
        self.on_apply = self._apply
        # Without an event loop (memory, filesystem transports) nobody would come back to a parked task.
        self._inline = bool(self.options.get("threads"))
        self._thread = 0
        self._consumer: Any = None
        self._leave: Callable[[], None] = lambda: None
        self._looks = Looks()
        self._running = Running()
        self._suspects = Suspects(self._settings.max_deliveries)
        self._adoption = Adoption(self._running, self._suspects)
        self._strays = Strays(self._settings.max_deliveries)
        self._wakeup = Wakeup()
        self._pace = Pace(self._settings.max_queue_delay, self._settings.target_latency)
        self._soft = SoftShutdown(self.app)
        self._make_engine()
        self._make_loop()
        # The consumer, which connects, is made after the pool.
        reserve_messages(self.app)
        refuse_unreadable(self.app, begun=lambda: self._running.begun)
        signals.celeryd_after_setup.connect(self._meet_worker)
        signals.worker_ready.connect(self._meet_consumer)
        signals.task_received.connect(limits.repair_shape)

    def _make_engine(self) -> None:
        """The parts that compute, and those that watch."""
        chosen = self._settings
        engine = self.engine = Engine(
            max_batch_seconds=chosen.max_batch_seconds,
            target_latency=chosen.target_latency,
            weight_of=lambda app: chosen.apps[app].weight if app else 1.0,
            watch=Waiter(self._wakeup.set).watch,
            streams=Streams(self._wakeup.set),
            own_seconds=lambda: self._share.own_seconds(),
            more_there=is_more_there,
        )
        self._share = Share(engine.held_seconds, calls=lambda: engine.calls, max_seconds=chosen.max_held_seconds)
        self._reports = Reports(
            counters=lambda: engine.computed,
            loads=lambda: sum(slot.loads for slot in default_registry().slots.values()),
        )
        self._watcher = Watcher(
            running=self._running,
            wake=self._wakeup.set,
            stall_seconds=chosen.stall_seconds,
            ends_at=lambda: self._soft.until_if_begun,
        )

    def _make_loop(self) -> None:
        """The parts that tasks go through, from their arrival to the worker's end."""
        # Long, since each argument has its line; nothing is decided here.
        chosen = self._settings
        self._intake = Intake(
            window(chosen),
            self._running,
            self._share,
            waiting=lambda: len(self._loop.backlog),
            aside=lambda: self.engine.set_aside,
            is_ending=lambda: self._ending.is_near or in_doubt() or is_answer_awaited(),
            bound=lambda: self._suspects.bound,
            max_bytes=chosen.max_held_bytes.of(0),
        )
        self._loop = Loop(
            engine=self.engine,
            running=self._running,
            wakeup=self._wakeup,
            watcher=self._watcher,
            pace=self._pace,
            intake=self._intake,
            app_limits=AppLimits(chosen.apps, self._running),
            strays=self._strays,
            review_models=lambda: default_registry().residency.review(),
            ended=self._note_end,
            comes_again=lambda request, error: timed.comes_again(request, error, self._fetching.hub),
            ends_at=lambda: self._soft.until_if_begun,
            cancel=self._soft.cancel_rest,
        )
        self._suspects.is_blocked = self._loop.app_limits.blocks
        self._ending = Ending(
            loop=self._loop,
            running=self._running,
            engine=self.engine,
            intake=self._intake,
            soft=self._soft,
            reports=self._reports,
            release=self._release,
        )
        self._soft.may_cancel = self._may_cancel
        self._fetching = Fetching(self.engine, self._intake, self._pace)
        self._entrance = Entrance(
            *(self.app, chosen, self.options), wake=self._loop.wake, is_inline=self._inline, strays=self._strays
        )
        self._computing = Computing(self.engine, self._loop)
        self._host = FiberHost(self._loop, self.engine, self._running, is_inline=self._inline)
        #: What metrics ask; None if nobody wants them.
        self.figures = figures.shown(
            self.app, chosen, self._running, self.engine, self._intake, self._loop, self._watcher
        )

    def __repr__(self) -> str:
        return f"<ModelPool: {self._loop!r}, {self._intake!r}, {self.engine!r}>"

    @property
    def limit(self) -> int:
        """The window."""
        return self._intake.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        """Celery's constructor sets what it calls the concurrency. The window is the settings'."""

    @property
    def num_processes(self) -> int:
        """What Celery multiplies to get the prefetch count: the tasks that this worker may hold now."""
        return self._intake.most

    # Start

    def on_start(self) -> None:
        """Have handles of this process park from now on, and load the pinned models."""
        self._thread = threading.get_ident()
        self._watcher.start()
        prepare_process()
        handle.use_compute(self._computing.compute)
        parking.use(self._host)
        told = tell_own_time(), show_quickly(lambda: are_seen(self._consumer))
        ends = end_in_fibers(self._run_end, self._strays), ignore_late_revokes(), store_patiently()
        self._undo = (*told, *ends, quickjson.use())
        turns.use(sql.is_blind)
        own.use()
        if not self._inline:
            store_in_groups(self.app)
            ask_early(self.app)
        load_pinned(default_registry())

    def register_with_event_loop(self, hub: Any) -> None:
        """Celery calls this at each connection to the broker; the hub forgets its readers in between."""
        self._fetching.hub = self._ending.hub = hub
        hub.add_reader(self._wakeup.fileno(), self._turn)
        self._intake.reconnect()
        residency = default_registry().residency
        residency.is_looked_after = True
        every = [
            (looks.IDLE, residency.evict_idle),
            (looks.WAITING, residency.review),
            (looks.WAITING, turns.look),
            (looks.WAITING, self._loop.look_again),
            (looks.MEMORY, residency.watch),
            (reports.BUSY_SECONDS, lambda: self._reports.busy(len(self._running), len(self._loop.backlog))),
            (looks.SHARE, self._intake.decide),
        ]
        if isinstance(self.app.backend, Routing):
            every.append((looks.DELIVERY, self._intake.replace_delivering))
        self._looks.begin(hub, every)
        self._looks.later(hub, VOUCH_SECONDS, self._suspects.vouch)

    def _meet_worker(self, instance: Any = None, **_: Any) -> None:
        """Before it connects: the broker must hand over no more than a worker holds that knows nothing yet."""
        if instance.pool is self:
            self._consumer = self._ending.consumer = instance.consumer
            keep_discarded(instance.consumer)
            self._adoption.meet(instance.consumer)
            self._intake.meet(instance.consumer)
            self._leave = join(
                Worker(
                    node=instance.hostname,
                    lease_seconds=self._settings.lease_seconds,
                    max_deliveries=self._settings.max_deliveries,
                    keeps=functools.partial(
                        self._running.outlasting, self.app.conf.worker_cancel_long_running_tasks_on_connection_loss
                    ),
                    harmless=lambda: tags_of(self._running.delivering),
                    is_hurried=lambda: self._loop.is_overdue or self.engine.is_hurried,
                    is_shared=lambda: self.engine.is_shared,
                )
            )

    def _meet_consumer(self, sender: Any = None, **_: Any) -> None:
        """Its handlers of signals are installed by now."""
        if sender.pool is self:
            reports.started(self.app, self._settings, self.limit, self.taking())
            reports.with_others(*held_by_workers(sender.task_consumer.channel), self._settings.lease_seconds)
            self._soft.meet(sender)
            if not self._inline:
                reports.early_acks(self.app, min(self.limit, EARLY_WINDOW))

    # Tasks

    def _apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        callback: Callable[[Any], Any] = lambda _: None,
        accept_callback: Callable[[int, float], Any] | None = None,
        timeout_callback: Callable[[bool, float], None] = lambda is_soft, seconds: None,
        error_callback: Callable[[Any], Any] = lambda _: None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        **_: Any,
    ) -> None:
        if threading.get_ident() != self._thread:  # a timer thread: greenlets can't leave theirs
            apply_target(target, args, kwargs, callback, accept_callback)
            return
        job = Job(
            target=target,
            args=args,
            kwargs=kwargs or {},
            callback=callback,
            error_callback=error_callback,
            accept_callback=accept_callback,
        )
        self._admit(self._entrance.fiber(job, soft_timeout, timeout, timeout_callback))

    def _admit(self, fiber: Fiber) -> None:
        """Let a task begin as soon as it may; if nobody would come back to it, run it to its end now."""
        if not self._inline:
            self._suspects.add(fiber)
            self._loop.admit(fiber)
            if self._suspects.bound < inf or is_answer_awaited():
                self._loop.look_again()
            return
        self._loop.start(fiber)
        if self._loop.lost is not None:
            self._ending.give_up(self._loop.lost)

    def _run_end(self, end: Callable[[], None], name: str) -> None:
        """Run Celery's code for a task that ends without running."""
        if self._inline or threading.get_ident() != self._thread or fibers.current() is not None:
            end()
            return
        fiber = Fiber(end, app="", name=name, wake=self._loop.wake)
        fiber.phase = Phase.ENDING
        self._loop.start(fiber)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """`revoke(terminate=True)` on a running task: unwind its fiber."""
        if (fiber := fiber_of(pid)) is not None:
            fiber.terminate()
            if fiber.dead:
                self._loop.forget(fiber)
            self._wakeup.set()  # another may start in its place

    def _turn(self) -> None:
        """The hub came round: look for more tasks, or compute one batch."""
        self._wakeup.clear()
        try:
            with own.outlive_handlers("the worker's own code"):
                self._loop.turn(self._fetching.is_over)
            self._intake.decide_if_due()
        except DeviceLostError as error:
            self._ending.give_up(error)
        finally:
            # With a batch in flight and nothing to put behind it, the hub may sleep: the waiter wakes it.
            if self._loop.has_work:
                self._wakeup.set()

    def _may_cancel(self) -> bool:
        """Whether the code that runs is a task's own, or none of this package's."""
        fiber = fibers.current()
        return not self._loop.is_turning if fiber is None else fiber.phase is Phase.BODY

    def _note_end(self, fiber: Fiber) -> None:
        if fiber.request is not None:  # a task ran
            self._suspects.discard(fiber)
            self._share.ended(fiber.ran_seconds)
            self._reports.ended(fiber.clock.waited(monotonic()))

    def flush(self) -> None:
        """The connection is gone: the broker will give tasks that were not accepted to someone again."""
        self._loop.backlog.clear()
        self._adoption.lost()

    def grow(self, n: int = 1) -> None:
        """`celery control pool_grow`: a wider window."""
        self._intake.resize(self.limit + n)

    def shrink(self, n: int = 1) -> None:
        """`celery control pool_shrink`: a narrower window; what runs goes on."""
        self._intake.resize(self.limit - n)

    # End

    def on_stop(self) -> None:
        """Warm shutdown: what has started ends."""
        self._ending.warm()

    def on_terminate(self) -> None:
        """Cold shutdown, and a soft one before it, if the project has one."""
        self._ending.cold()

    def _release(self) -> None:
        self._suspects.vouch(ends=True)
        self._watcher.stop()
        self._wakeup.close()
        handle.use_compute(handle.compute_directly)
        parking.stop()
        for undo in (self._leave, *self._undo):
            undo()

    # What an operator asks

    def taking(self) -> str:
        """How messages come to this worker: `broker.redis.taking`, or that nothing is known before it is ready."""
        task_consumer = None if self._consumer is None else self._consumer.task_consumer
        return "not yet" if task_consumer is None else taking(task_consumer.channel)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        return info | {
            "max-concurrency": self.limit,
            "timeouts": (self._entrance.soft or 0, self._entrance.hard or 0),
            "window": self.limit,
            "messages": self.taking(),
            "adopted": self._adoption.count,
            **figures.of_work(self._running, self.engine),
            "limits": self._loop.app_limits.report(self._loop.backlog),
            **self._reports.report(),
            **figures.of_models(default_registry(), self.engine),
            **({"routing": self.app.backend.report()} if isinstance(self.app.backend, Routing) else {}),
        }
