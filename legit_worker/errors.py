"""Every error this project raises.

In: nothing. Out: exception classes whose only argument is their message, so that each one survives a
Celery result in JSON (`exc_type`, `exc_module`, `exc_message`) and comes back as itself.
"""

from __future__ import annotations


class LegitWorkerError(Exception):
    """The base of all errors raised by legit_worker."""

    #: Whether the same message, sent again later, could succeed. Result envelopes carry it.
    retryable: bool = False


class InvalidInputError(LegitWorkerError, ValueError):
    """The caller's input can never be computed: empty, too long, not text, not finite, not an image."""


class UnknownModelError(LegitWorkerError, LookupError):
    """No configured model has the alias that was asked for, or several could be meant."""


class ModelLoadError(LegitWorkerError):
    """A configured model could not be loaded."""

    retryable = True


class WaitedTooLongError(LegitWorkerError):
    """A task waited longer than `LEGIT_WORKER_MAX_WAIT_SECONDS` for company, for its turn and for models to load."""

    retryable = True


class DeviceOutOfMemoryError(LegitWorkerError):
    """One item needs more memory than the device can give it, alone in its batch."""

    retryable = True


class DeviceLostError(LegitWorkerError):
    """A kernel broke the process's CUDA context: nothing can be computed there until a worker is started anew."""

    retryable = True


class CudaForbiddenError(LegitWorkerError):
    """A process that promised never to touch CUDA was asked to."""


class RoutingError(LegitWorkerError):
    """A result could not be delivered to its app's queue."""

    retryable = True


class SettingsError(LegitWorkerError, ValueError):
    """A setting is unknown or has a bad value; the message names the variable."""
