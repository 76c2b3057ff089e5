"""What the current task may bring.

In: the settings, and the task that runs here. Out: the limits of its app.
"""

from __future__ import annotations

import functools

from legit_worker import apps, settings
from legit_worker.inputs.limits import Limits, limits_of

chosen_settings = functools.cache(settings.load)


def current_limits() -> Limits:
    """Return the limits of the current task's app."""
    chosen = chosen_settings()
    return _limits_of(apps.of_current_task(chosen) if chosen.apps else "")


@functools.cache
def _limits_of(app: str) -> Limits:
    return limits_of(chosen_settings(), app)


def forget() -> None:
    """Have the settings read again: a test may have changed the environment."""
    chosen_settings.cache_clear()
    _limits_of.cache_clear()
