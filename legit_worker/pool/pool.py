"""Celery's face of this project: the pool class that a worker runs its tasks in.

In: tasks, from the worker's consumer, by `apply_async`. Out: Celery's callbacks, when each is accepted and when it
is done, as the solo pool would have called them.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures
from math import inf
from time import monotonic
from typing import Any

from celery import signals
from celery.concurrency.base import apply_target
from celery.concurrency.solo import TaskPool as SoloPool
from celery.platforms import EX_FAILURE
from celery.worker import state
from celery.worker.state import maybe_shutdown

from legit_worker import parking, settings
from legit_worker.apps import identify
from legit_worker.broker.acks import flush_acks
from legit_worker.broker.redis import held_by_workers, reserve_messages, taking
from legit_worker.broker.refusals import DATA_ERRORS, give_up_request, refuse_unreadable
from legit_worker.device.cpu import bound_kernels, keep_freed_memory
from legit_worker.device.cuda import prepare_environment
from legit_worker.device.memory import give_back_cached
from legit_worker.errors import DeviceLostError, InvalidInputError
from legit_worker.models import handle, requirements
from legit_worker.models.quiet import quiet_libraries
from legit_worker.models.registry import default_registry
from legit_worker.pool import limits, reports, sql, turns
from legit_worker.pool.backlog import Backlog
from legit_worker.pool.clock import Waits
from legit_worker.pool.engine import Counters, Engine
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.host import FiberHost
from legit_worker.pool.jobs import Job
from legit_worker.pool.limits import Limit
from legit_worker.pool.loop import Pace, Wakeup, listen
from legit_worker.pool.reports import Reports
from legit_worker.pool.runner import FiberRunner
from legit_worker.pool.share import Prefetch, Share
from legit_worker.pool.softly import SoftShutdown
from legit_worker.pool.telling import tell_own_time
from legit_worker.pool.waiter import Waiter
from legit_worker.pool.watcher import Turn, Watcher
from legit_worker.routing.backend import Routing

logger = logging.getLogger(__name__)

#: Tasks in flight, where LEGIT_WORKER_WINDOW does not say. Measured with MiniLM on two CPU cores: 388 short texts a
#: second with 64, 362 with 256, 444 with 1,024; mixed ones don't care. `LEGIT_WORKER_WINDOW=256 scripts/bench` measures
#: it again.
DEFAULT_WINDOW = 1024

#: The most tasks that run at once and are acked early: a kill loses all of them. They are enough for a batch of short
#: texts, and a prefork worker with as many processes loses as many.
EARLY_WINDOW = 32

#: Of the tasks that are acked early, how many a warning names.
NAMED = 3

#: Seconds between two looks at the tasks that are held until their result is routed.
HELD_LOOK = 1.0

#: Seconds between two decisions about how many tasks to hold, while nothing else happens.
SHARE_LOOK = 1.0

#: Seconds between two looks for models that nobody has used for their `keep_alive`; whether one that waits for room has
#: waited for long enough; and at the start, while pinned models load, whether the worker is to stop.
IDLE_LOOK = 1.0
WAITING_LOOK = 0.25
STOP_LOOK = 0.1

#: Seconds that a worker waits, at its end, for batches that nobody waits for any more.
FLIGHT_SECONDS = 5.0

#: Seconds between two looks at what other processes have of the device's memory.
MEMORY_LOOK = 5.0


def window(chosen: settings.Settings) -> int:
    """How many tasks may be in flight."""
    return chosen.window or DEFAULT_WINDOW


class ModelPool(SoloPool):
    """A solo pool whose tasks park at model calls. Lives on the worker's main thread; owns its fibers.

    Never runs two pieces of task code at once, and never switches tasks except at a model call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings.load_or_exit()
        # Here, and not in `install()` alone, since `-P custom` needs no `install()`.
        requirements.check_or_exit(self._settings)
        quiet_libraries()
        #: Tasks that have started in this worker.
        self.begun = 0
        # The consumer, which connects, is made after the pool.
        reserve_messages(self.app)
        refuse_unreadable(self.app, begun=lambda: self.begun)
        self.limit = window(self._settings)
        self.on_apply = self._apply
        # Without an event loop (memory, filesystem transports) nobody would come back to a parked task.
        self._inline = bool(self.options.get("threads"))
        self._thread = 0
        self._soft = SoftShutdown(self.app)
        # The device is gone, and every task was told.
        self._has_given_up = False
        self._running: set[Fiber] = set()
        self._backlog = Backlog()
        self._waits = Waits()
        self._ready: deque[Fiber] = deque()
        self._wakeup = Wakeup()
        self._watcher = Watcher(
            running=self._running,
            wake=self._wakeup.set,
            stall_seconds=self._settings.stall_seconds,
            ends_at=lambda: self._soft.until_if_begun,
        )
        self._soft_limit, self._hard_limit = self._own_limits()
        self._pace = Pace(self._settings.max_queue_delay)
        self._hub: Any = None
        self._consumer: Any = None
        # Tasks that wait for the delivery of their result, how many did so at the last look, and how many of them
        # wait for long enough to have another task take their place.
        self._host = FiberHost(is_inline=self._inline)
        self._held = self._host.delivering
        self._held_before = 0
        self._replaced = 0
        self._gave_way = False
        self.engine = Engine(
            max_batch_seconds=self._settings.max_batch_seconds,
            weight_of=lambda app: self._settings.apps[app].weight if app else 1.0,
            free_memory=_free_memory,
            watch=Waiter(self._wakeup.set).watch,
        )
        self._share = Share(
            self.engine.held_seconds, calls=lambda: self.engine.calls, max_seconds=self._settings.max_held_seconds
        )
        # How many tasks to hold, and who tells the broker.
        self._most = self._share.cold(self.limit)
        self._prefetch: Prefetch | None = None
        self._reports = Reports(
            counters=lambda: sum(self.engine.counters.values(), Counters()),
            loads=lambda: sum(entry.loads for entry in default_registry().entries.values()),
        )
        self._runner = FiberRunner(self.engine, wake=self._wake, on_lost=self._wakeup.set, models_of=self._models_of)
        signals.celeryd_after_setup.connect(self._meet_worker)
        signals.worker_ready.connect(self._meet_consumer)
        signals.task_received.connect(limits.repair_shape)

    def __repr__(self) -> str:
        return (
            f"<ModelPool: {len(self._running)} of {self.limit} running, {self._parked()} of them parked, "
            f"{len(self._backlog)} not started, {self.engine!r}>"
        )

    @property
    def num_processes(self) -> int:
        """What Celery multiplies to get the prefetch count: the tasks that this worker may hold now."""
        return self._most

    def on_start(self) -> None:
        """Handles of this process park from now on; pinned models start to load."""
        self._thread = threading.get_ident()
        self._watcher.start()
        keep_freed_memory()
        bound_kernels()  # under `-P custom` without `install()`, nobody did before
        prepare_environment()
        # Texts are tokenized one at a time, and waking a thread pool for each takes four times the work itself.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._runner_before = handle.use_runner(self._runner)
        parking.use(self._host)
        self._stop_telling = tell_own_time()
        turns.use(sql.is_blind)
        self._load_pinned()

    def _load_pinned(self) -> None:
        """All of them, before the first task comes. One that can't be loaded ends the worker."""
        registry = default_registry()
        requests = [registry.residency.request(entry) for entry in registry.entries.values() if entry.spec.pin]
        while not all(request.future.done() for request in requests):
            futures.wait([request.future for request in requests], timeout=STOP_LOOK)
            maybe_shutdown()
        for request in requests:
            registry.residency.release(request)
        if errors := [str(request.future.exception()) for request in requests if request.future.exception()]:
            logger.critical("the worker ends; correct the model's settings, or unpin it: %s", "; ".join(errors))
            raise SystemExit(EX_FAILURE)

    def register_with_event_loop(self, hub: Any) -> None:
        """Celery calls this at each connection to the broker; the hub forgets its readers in between."""
        self._hub = hub
        hub.add_reader(self._wakeup.fileno(), self._turn)
        # What is held from before has no place in the new connection's window.
        self._replaced = 0
        hub.call_repeatedly(IDLE_LOOK, default_registry().residency.evict_idle)
        hub.call_repeatedly(WAITING_LOOK, default_registry().residency.review)
        hub.call_repeatedly(WAITING_LOOK, turns.look)
        hub.call_repeatedly(MEMORY_LOOK, default_registry().residency.watch)
        hub.call_repeatedly(reports.BUSY_SECONDS, self._report)
        if isinstance(self.app.backend, Routing):
            hub.call_repeatedly(HELD_LOOK, self._replace_held)
        hub.call_repeatedly(SHARE_LOOK, self._decide_share)

    def _report(self) -> None:
        self._reports.busy(len(self._running), len(self._backlog))

    def flush(self) -> None:
        """The connection is gone: the broker will give tasks that were not accepted to someone again."""
        self._backlog.clear()

    def grow(self, n: int = 1) -> None:
        """`celery control pool_grow`: a wider window."""
        self.limit += n
        self._decide_share()

    def shrink(self, n: int = 1) -> None:
        """`celery control pool_shrink`: a narrower window; what runs goes on."""
        self.limit = max(1, self.limit - n)
        self._decide_share()

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """`revoke(terminate=True)` on a running task: unwind its fiber."""
        fiber: Fiber | None = getattr(pid, "fiber", None)
        if fiber is not None:
            fiber.terminate()
            self._running.discard(fiber)
            self._wakeup.set()  # another may start in its place

    def on_stop(self) -> None:
        """Warm shutdown: what has started ends."""
        if not self._soft.is_called_by_handler():
            self._shut_down(until=inf)

    def on_terminate(self) -> None:
        """Cold shutdown, and a soft one before it, where the project has one."""
        self._shut_down(until=self._soft.until)

    def _shut_down(self, until: float) -> None:
        """The one way out. Each step stands where it does because an earlier place would lose something."""
        # No consumer is to be started any more.
        self._prefetch = None
        # The consumer has stopped before the pool, so no task arrives any more. Those not started were not accepted:
        # the broker has them still, and gives them to another worker once this one's connection closes.
        self._backlog.clear()
        # Those that started run to their end: in a warm shutdown all, in a soft one those that can in its time, in a
        # cold one none. A signal that comes meanwhile can turn the first into one of the others.
        while self._running and monotonic() < min(until, self._soft.until_if_begun):
            self._reports.finishing([fiber.waits_for for fiber in self._running])
            self._drain()
        # Celery tells the rest that they are cancelled, which is when their ends would be wrong afterwards.
        self._soft.cancel_rest()
        # Whoever is left unwinds where it stands. Its message, acked late, goes back to the broker.
        for fiber in list(self._running):
            fiber.terminate()
        self._running.clear()
        # A thread that waits for the device must not come back to an interpreter that is gone.
        self.engine.wait(FLIGHT_SECONDS)
        # Only now does nobody need the way back from the loader thread, nor a runner that parks; and nobody is late.
        self._watcher.stop()
        self._wakeup.close()
        self._stop_parking()

    def _drain(self) -> None:
        """What the loop would do, once."""
        try:
            self._advance()
        except DeviceLostError as error:
            self._give_up(error)
        except Exception:  # a callback that met a lost connection must not take the other tasks with it
            logger.exception("a task ended badly while the worker was stopping")
        if self._running and not self.engine.can_step and not self._ready:
            self._wait_for_others()
        # The loop no longer turns, and both must go on: what is done is acked before whoever stops us loses
        # patience and kills, and heartbeats keep the connection for the acks that follow.
        self._tend_hub()

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        return info | {
            "max-concurrency": self.limit,
            "timeouts": (self._soft_limit or 0, self._hard_limit or 0),
            "window": self.limit,
            "messages": self.taking(),
            "in_flight": len(self._running),
            "parked": self._parked(),
            **self._waits.report(),
            **sum(self.engine.counters.values(), Counters()).report(),
            "models": {alias: self._model_info(alias) for alias in default_registry().entries},
            "memory": default_registry().residency.report(),
            **({"routing": self.app.backend.report()} if isinstance(self.app.backend, Routing) else {}),
        }

    def taking(self) -> str:
        """How messages come to this worker: `broker.redis.taking`, or that nothing is known before it is ready."""
        task_consumer = getattr(self._consumer, "task_consumer", None)
        return "not yet" if task_consumer is None else taking(task_consumer.channel)

    def _model_info(self, alias: str) -> dict[str, Any]:
        entry = default_registry().entries[alias]
        info: dict[str, Any] = {
            "kind": entry.spec.kind,
            "state": entry.state,
            "weights": entry.size,
            "reserve": entry.reserve,
            "loads": entry.loads,
        }
        counters = self.engine.counters.get(alias)
        if counters is not None:
            info |= {**counters.report(), "forward_seconds": round(counters.forward_seconds, 3)}
        return info

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
        fiber = self._fiber(job, soft_timeout, timeout, timeout_callback)
        if self._inline or (self._may_start() and (fiber.acks_late or self._may_start_early())):
            self._start(fiber)
        else:
            self._backlog.append(fiber)

    def _fiber(self, job: Job, soft: Any, hard: Any, on_timeout: Callable[[bool, float], None]) -> Fiber:
        run, limit = job.run, None
        try:
            limit = self._limit(job, soft, hard, on_timeout)
        except InvalidInputError as error:
            run = functools.partial(job.refuse, error)
        app = identify(self._settings, job.headers) or ""
        if app not in self._settings.apps:
            app = ""
        fiber = Fiber(
            run,
            app=app,
            name=job.name,
            request=job.request,
            acks_late=bool(getattr(self.app.tasks.get(job.task), "acks_late", True)),
            exclusive=self._inline or bool(app and not self._settings.apps[app].batching),
            wake=self._wake,
        )
        fiber.limit = limit
        fiber.max_wait = self._settings.max_wait_seconds or inf
        return fiber

    def _limit(self, job: Job, soft: Any, hard: Any, on_timeout: Callable[[bool, float], None]) -> Limit | None:
        """This task's limits: its message's, its own, or the worker's. Raises `InvalidInputError`."""
        header = job.headers.get("timelimit")
        source = f"in its message's header timelimit={header!r}" if header else "in its own options"
        soft = limits.seconds_of(soft, f"the soft time limit of {job.name}, {source},") or self._soft_limit
        hard = limits.seconds_of(hard, f"the time limit of {job.name}, {source},") or self._hard_limit
        if not soft and not hard:
            return None
        tell = limits.timeout_callback(job.name, on_timeout, job.error_callback)
        return Limit(soft=soft, hard=hard, on_timeout=tell)

    def _start(self, fiber: Fiber) -> None:
        self._pace.task_arrived()
        self.begun += 1
        self._running.add(fiber)
        if fiber.limit is not None or fiber.max_wait < inf:
            self._watcher.look_often()
        self._switch_to(fiber)
        self._wakeup.set()

    def _switch_to(self, fiber: Fiber, error: BaseException | None = None) -> None:
        """Run a fiber until it parks or ends.

        What a server's or a network's failure raises in Celery's own callbacks goes up to the worker, as in solo. A
        message that they can't deal with does not end the worker.
        """
        sql.watch()
        self._watcher.turn = Turn(fiber=fiber, since=monotonic())
        try:
            fiber.resume(error)
        except DATA_ERRORS as data_error:
            give_up_request(fiber.request, data_error)
        finally:
            self._share.ran(monotonic() - self._watcher.turn.since, ended=fiber.dead)
            self._watcher.turn = None
            if fiber.dead:
                self._running.discard(fiber)
                waited = fiber.clock.waited(monotonic())
                self._waits.note(waited)
                self._reports.ended(waited)

    def _wake(self, fiber: Fiber) -> None:
        """Have a parked fiber resumed at the next turn. Called by any thread."""
        if not fiber.woken:
            fiber.woken = True
            self._ready.append(fiber)
        self._wakeup.set()

    def _turn(self) -> None:
        """The hub came round: look for more tasks, or compute one batch."""
        self._wakeup.clear()
        try:
            default_registry().residency.review()
            self._give_up_if_lost()
            if self.engine.collect():
                self._pace.batch_done()
            self._end_overdue()
            self._resume_ready()
            if self.engine.can_step and self._should_compute():
                self.engine.step()
                self._resume_ready()
                self._pace.batch_done()
            if self._prefetch is not None and self._prefetch.is_due():
                self._decide_share()
        except DeviceLostError as error:
            self._give_up(error)
        finally:
            # With a batch in flight and nothing to put behind it, the hub may sleep: the waiter wakes it.
            if self.engine.can_step or self._ready:
                self._wakeup.set()

    def _should_compute(self) -> bool:
        # The hub calls those that can be read in the order in which they could: without this, an operator's command
        # that came during a batch would wait for the next one, too. Once in a row, so that no flood stops the batches.
        self._gave_way = not self._gave_way and listen(self._hub.poller.poll, 0)
        if self._gave_way:
            return False
        # While the device is busy, a wait for company costs nothing, and is over: the batch is full.
        if self.engine.is_busy or self._is_full():
            return True
        return self._pace.should_compute(
            waiting_seconds=self.engine.waiting_seconds(),
            surplus_seconds=self.engine.surplus_seconds(),
            launch_seconds=self.engine.launch_seconds(),
            full=self.engine.has_full_batch,
            look=functools.partial(listen, self._hub.poller.poll),
        )

    def _give_up(self, error: DeviceLostError) -> None:
        """The process is of no more use: hand back what it holds, take no more, and end with an exit code that says so.

        Tasks whose messages were acked early can't be handed back. They fail with the error.
        """
        if self._has_given_up:
            return
        self._has_given_up = True
        # First, so that whatever happens below, the worker ends.
        state.should_stop = os.EX_SOFTWARE
        if self._consumer is not None:  # in the middle of a warm shutdown, that comes too late
            self._consumer.controller.exitcode = os.EX_SOFTWARE
        atexit.register(_leave)
        self._runner.lost = error
        logger.critical("%s; the worker ends, and %d tasks go back to the broker", error, len(self._running))
        self._backlog.clear()
        self.engine.forget()
        self._resume_ready()  # the one whose item it was
        for fiber in self._running - self._held:
            try:
                fiber.terminate(None if fiber.acks_late else DeviceLostError(*error.args))
            except Exception:
                logger.exception("task %s ended badly", fiber.name)
            if fiber.dead:
                self._running.discard(fiber)

    def _resume_ready(self) -> None:
        for _ in range(len(self._ready)):
            fiber = self._ready.popleft()
            if not fiber.dead:
                self._switch_to(fiber)
        while self._may_start() and (first := self._backlog.take(self._may_start_early)) is not None:
            self._start(first)

    def _end_overdue(self) -> None:
        """Tell parked tasks whose time is over."""
        for fiber in [fiber for fiber in self._running if fiber.pending is not None or fiber.has_waited_too_long]:
            if fiber.waits_for is not None and (error := fiber.due(fiber.waits_for)) is not None:
                self._switch_to(fiber, error)

    def _give_up_if_lost(self) -> None:
        if self._runner.lost is not None:
            self._give_up(self._runner.lost)

    def _advance(self) -> None:
        """What can be done by now, and whatever it lets go on."""
        self._give_up_if_lost()
        self._end_overdue()
        self.engine.collect()
        if self.engine.can_step:
            self.engine.step()
        self._resume_ready()

    def _wait_for_others(self) -> None:
        """All that still runs waits for a model to load, or for the device."""
        self._wakeup.wait(WAITING_LOOK)
        self._wakeup.clear()
        default_registry().residency.review()
        turns.look()

    def _tend_hub(self) -> None:
        """What the hub does for Celery between two messages; as prefork does while it drains (5.7)."""
        if self._hub is None:
            return
        try:
            self._hub.fire_timers()
            for callback in self._hub._pop_ready():
                callback()
            flush_acks()
        except Exception:
            logger.warning("an ack or a heartbeat failed while the worker was stopping", exc_info=True)

    def _stop_parking(self) -> None:
        handle.use_runner(self._runner_before)
        parking.stop()
        self._stop_telling()

    def _is_full(self) -> bool:
        """Whether no other task may start. Those that only wait for another server don't count."""
        return self._in_progress() >= self.limit

    def _in_progress(self) -> int:
        """Tasks that began, and wait for more than the delivery of their result."""
        return len(self._running) - len(self._held)

    def _may_start(self) -> bool:
        return not self._is_full() and not self._is_ending()

    def _may_start_early(self) -> bool:
        """Whether one more may start of the tasks that a kill would lose. Until then it is not acked."""
        return self._in_progress() < self._most and self._running_early() < EARLY_WINDOW

    def _running_early(self) -> int:
        """Tasks whose messages were acked when they began."""
        return sum(not fiber.acks_late and fiber not in self._held for fiber in self._running)

    def _is_ending(self) -> bool:
        """Whether a task that began now would only be ended: one that did not is still the broker's."""
        return self._has_given_up or self._soft.has_begun

    def _replace_held(self) -> None:
        """Other apps' tasks are not to wait for a server that is away: fetch one more for each that is held for long.

        What is held is bounded by the bytes that a lane takes (`routing.lanes.MAX_WAITING_BYTES`).
        """
        self._replaced, self._held_before = min(len(self._held), self._held_before), len(self._held)
        self._decide_share()

    def _decide_share(self) -> None:
        """Take no more tasks than others can spare, and tell the broker."""
        waiting = len(self._backlog)
        self._most = self._share.most(self._in_progress() + waiting, waiting, self.limit)
        if self._prefetch is not None:
            # The broker counts what is not acked.
            self._prefetch.want(max(1, self._most - self._running_early()) + self._replaced)

    def _parked(self) -> int:
        return sum(fiber.waits_for is not None for fiber in self._running)

    def _models_of(self, app: str) -> tuple[str, ...] | None:
        return self._settings.apps[app].models if app else None

    def _own_limits(self) -> tuple[float | None, float | None]:
        """The worker's own, as its command line or its project has them; bad ones end it."""
        try:
            return (
                limits.seconds_of(self.options.get("soft_timeout"), "the worker's soft time limit"),
                limits.seconds_of(self.options.get("timeout"), "the worker's time limit"),
            )
        except InvalidInputError as error:
            raise SystemExit(f"legit_worker: {error}") from None

    def _meet_worker(self, instance: Any = None, **_: Any) -> None:
        """Before it connects: the broker is to hand over no more than a worker holds that knows nothing yet."""
        if instance.pool is self:
            self._consumer = instance.consumer
            self._prefetch = Prefetch(instance.consumer, self._most)

    def _meet_consumer(self, sender: Any = None, **_: Any) -> None:
        """Its handlers of signals are installed by now."""
        if sender.pool is self:
            reports.started(self.app, self._settings, int(self.limit), self.taking())
            reports.with_others(*held_by_workers(sender.task_consumer.channel))
            self._soft.meet(sender)
            self._warn_of_early_acks()

    def _warn_of_early_acks(self) -> None:
        """Solo loses one task at a kill, and this pool what it has in flight: nobody is to learn that from the loss."""
        tasks = self.app.tasks.items()
        early = sorted(name for name, task in tasks if not task.acks_late and not name.startswith("celery."))
        if early and not self._inline:
            logger.warning(EARLY_ACKS, ", ".join(early[:NAMED]), len(early), min(self.limit, EARLY_WINDOW))


#: What an operator reads at the start. A task in the queue, or one that has not started, is never lost.
EARLY_ACKS = (
    "Some tasks are acked before they run (%s: %d in all). A kill of this worker loses those that have started, up to "
    "%d, and nobody is told; no more of them run at once. Set acks_late=True for each that may run twice."
)


def _free_memory() -> None:
    """Models that nobody uses make room for a batch that found none."""
    default_registry().residency.evict_unused()
    give_back_cached()


def _leave() -> None:
    """End a process whose device is lost, when nothing but Python's own end is left.

    That would free tensors, which torch then answers by an abort and another exit code.
    """
    atexit.unregister(_leave)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(os.EX_SOFTWARE)
