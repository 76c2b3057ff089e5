"""The pool: tasks as fibers, their calls as batches. `CELERY_CUSTOM_WORKER_POOL=legit_worker.pool:ModelPool`."""

from legit_worker.pool.pool import ModelPool

__all__ = ["ModelPool"]
