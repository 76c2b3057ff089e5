"""`legit_worker.install(app)`: the only changes to a Celery app.

In: a Celery app. Out: the same app. If legit_worker is enabled, the app's workers get one more bootstep, which swaps
the solo pool for ModelPool. They ack late unless the project chose otherwise, and route results if the settings say so.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from celery import Celery, bootsteps, signals
from celery.concurrency.solo import TaskPool as SoloPool

# Clients and beat import this module, too. So what reads settings, pydantic above all, is imported where it is used.
from legit_worker.device.cpu import bound_kernels
from legit_worker.prep.guard import forbid_cuda

if TYPE_CHECKING:
    from legit_worker import settings

logger = logging.getLogger(__name__)


def install(app: Celery) -> Celery:
    """Let the app's workers run ModelPool if `LEGIT_WORKER_ENABLED` is set; otherwise change nothing.

    With `LEGIT_WORKER_ROLE=prep` the workers keep their pool and get the prep tasks, and this process and its children
    can't start CUDA any more. Call it before anything else imports torch.
    """
    if not any(name.startswith("LEGIT_WORKER_") for name in os.environ):
        return app
    from legit_worker import settings

    if settings.is_enabled():
        enable(app)
    elif settings.unknown():
        signals.celeryd_after_setup.connect(_tell_unknown)
    return app


def enable(app: Celery) -> None:
    """Do what `install` does if legit_worker is enabled."""
    from legit_worker import settings
    from legit_worker.routing.backend import route_results

    if settings.is_prep():
        forbid_cuda()
    app.steps["worker"].add(ModelPoolStep)
    signals.celeryd_init.connect(_choose_log, dispatch_uid="legit_worker.log")
    route_results(app)
    if app.configured:
        _ack_late_by_default(app)
    else:
        app.on_after_configure.connect(_ack_late_by_default, weak=False)


class ModelPoolStep(bootsteps.Step):
    """Runs once per worker, before its pool is made."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        chosen = _chosen(worker)
        from legit_worker import control, tasks
        from legit_worker.models import fence

        _tell_doubts(worker, chosen)
        fence.use(chosen)
        control.register()
        tasks.check_or_exit(chosen)
        tasks.register(worker.app, chosen)
        signals.task_unknown.connect(tasks.suggest_alias)
        if chosen.role == "device":
            # For any pool: its processes inherit this environment.
            bound_kernels()
            _show_only_gpu(chosen.device)
            if self._swap_pool(worker, chosen):
                return  # ModelPool does the rest itself
        _prepare_other_pool(worker.app, chosen)

    @staticmethod
    def _swap_pool(worker: Any, chosen: settings.Settings) -> bool:
        """Swap the solo pool. Returns whether the worker has a `ModelPool` now."""
        from legit_worker.pool.intake import window
        from legit_worker.pool.pool import ModelPool

        if worker.pool_cls is not SoloPool and not issubclass(worker.pool_cls, ModelPool):
            logger.warning(
                "legit_worker is enabled, and the pool is %s: tasks call models directly, one at a time, and each "
                "process loads its own models. Start the worker with --pool=solo to compute tasks in batches.",
                worker.pool_cls.__module__,
            )
            return False
        if worker.pool_cls is SoloPool:
            worker.pool_cls = ModelPool
        # Celery shows this as its concurrency. The pool sets the prefetch count itself.
        # min_concurrency is a copy that the Pool step may have made already.
        worker.concurrency = worker.min_concurrency = window(chosen)
        worker.prefetch_multiplier = 1
        return True


def _chosen(worker: Any) -> settings.Settings:
    """Read a worker's settings. By these, take its name and its queues."""
    from legit_worker import settings

    chosen = settings.load_or_exit()
    if settings.take_name(worker.hostname, chosen):
        chosen = settings.load_or_exit()
        _take_queues(worker.app, chosen)
    return chosen


def _choose_log(instance: Any, **_: Any) -> None:
    """Give a worker that begins the form of its log, before it writes anything."""
    from legit_worker import settings

    chosen = settings.load_or_exit()
    if chosen.log == "json":
        from legit_worker.logs import write_first_warnings, write_json

        instance.quiet = True  # no banner
        write_first_warnings()
        write_json(chosen)


def _prepare_other_pool(app: Celery, chosen: settings.Settings) -> None:
    """Check the requirements of any other pool than ModelPool, and have the worker serve metrics."""
    import legit_worker
    from legit_worker import metrics, settings
    from legit_worker.models import requirements
    from legit_worker.models.quiet import quiet_libraries

    requirements.check_or_exit(chosen)
    quiet_libraries()
    if chosen.metrics_port is not None:
        metrics.enable(app)
    if chosen.role == "prep":
        aliases = ", ".join(chosen.models) or "none"
        logger.info(
            "legit_worker %s, role prep, can't start CUDA; models: %s; settings: %s",
            *(legit_worker.__version__, aliases, settings.listed_changes(chosen)),
        )


def _tell_doubts(worker: Any, chosen: settings.Settings) -> None:
    """Warn of settings that are allowed, and that may mean something else than their author thinks."""
    from legit_worker import settings

    doubts = (
        *settings.unknown_models(chosen),
        *settings.strange_name(worker.hostname, chosen),
        *settings.doubtful(chosen),
        *settings.taken_for_tasks(chosen, worker.app.amqp.queues.consume_from),
    )
    for sentence in doubts:
        logger.warning(sentence)


def _take_queues(app: Celery, chosen: settings.Settings) -> None:
    """Take tasks from the default queue and from the queues of this worker's models, unless the command names queues.

    In the default one are tasks that no model's queue is for: the project's, Celery's, and those for a misspelt model.
    """
    from legit_worker import settings

    queues = app.amqp.queues
    own = chosen.workers[chosen.node or ""]
    if own.models is not None and queues._consume_from is None:
        queues.select([app.conf.task_default_queue, *(settings.queue_of(chosen, alias) for alias in chosen.models)])


def _show_only_gpu(device: str) -> None:
    """Before anything of this worker starts CUDA. If there is no such GPU, end the worker with a sentence."""
    from legit_worker.device import cuda, vram

    try:
        cuda.show_only(device)
        cuda.check_number(device)
    except vram.VramUnknownError as error:
        raise SystemExit(f"legit_worker: {error}") from None


def _tell_unknown(**_: Any) -> None:
    """Warn of variables that are no settings: `LEGIT_WORKER_ENABLED` may be misspelt."""
    from legit_worker import settings

    for sentence in settings.unknown():
        logger.warning("legit_worker is off, and %s", sentence)


def _ack_late_by_default(sender: Celery, **_: Any) -> None:
    """Set late acks, unless the project has set them: a killed worker must lose no task, and inference may run twice.

    Celery lets a project's setting win over an added default only if both have one spelling. So look for every
    spelling first.
    """
    spellings = {"TASK_ACKS_LATE", "CELERY_ACKS_LATE", f"{sender.namespace}_TASK_ACKS_LATE"}
    chosen = (str(key).upper() for layer in sender.conf.maps[:-1] for key in layer)
    if spellings.isdisjoint(chosen):
        sender.conf.add_defaults({"task_acks_late": True})
