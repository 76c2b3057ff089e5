"""What an app has of its own in the settings, compared with what there is for all.

In: settings. Out: the same, with the bounds of each app's queues filled in; and sentences about models that an app may
use, by a name that no model here has. Another worker may serve a model that this one lacks. So a name is only an error
if it is nearly the name of a model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from legit_worker.settings.schema import AppSettings, Settings
from legit_worker.settings.values import fold, spelled

#: How alike two names are if one is a misspelling of the other: one wrong letter in six, or less.
ALIKE = 0.83

#: The settings that bound an app's queues. An app without its own takes them from all apps.
BOUNDS = ("queue_max_length", "queue_max_seconds", "dead_max_length", "dead_max_seconds")


def with_bounds(chosen: Settings) -> Settings:
    """Give each app the bounds of all apps, if it has none of its own."""

    def filled(app: AppSettings) -> AppSettings:
        missing = [name for name in BOUNDS if getattr(app, name) is None]
        return app.model_copy(update={name: getattr(chosen, name) for name in missing})

    return chosen.model_copy(update={"apps": {name: filled(app) for name, app in chosen.apps.items()}})


def unknown_models(settings: Settings) -> list[str]:
    """Return one sentence for each list that has a model which no model here is, and no misspelling of one."""
    return [
        f"{variable} names {alias!r}, and this worker has no such model: it has {_names(settings)}."
        for variable, alias in _strangers(settings)
        if _meant(alias, settings) is None
    ]


def misspelt(settings: Settings) -> list[str]:
    """Return one sentence for each name that is nearly a model's."""
    return [
        f"{variable} names {alias!r}, which is no model; did you mean {meant}?"
        for variable, alias in _strangers(settings)
        if (meant := _meant(alias, settings)) is not None
    ]


def _strangers(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield each variable and alias of a list that no model here has."""
    lists = {spelled(("apps", app, "models")): own.models for app, own in settings.apps.items()}
    lists[spelled(("no_app_models",))] = settings.no_app_models
    known = set(map(fold, settings.models))
    for variable, aliases in lists.items():
        yield from ((variable, alias) for alias in aliases or () if known and fold(alias) not in known)


def _meant(alias: str, settings: Settings) -> str | None:
    """Return the model whose name was meant: it differs in a few letters, and not in its digits or its end alone."""
    folded = fold(alias)
    for near in difflib.get_close_matches(folded, map(fold, settings.models), n=1, cutoff=ALIKE):
        is_other = folded.startswith(near) or near.startswith(folded) or _digits(folded) != _digits(near)
        return None if is_other else next(name for name in settings.models if fold(name) == near)
    return None


def _digits(alias: str) -> list[str]:
    return re.findall(r"\d+", alias)


def _names(settings: Settings) -> str:
    return ", ".join(settings.models)
