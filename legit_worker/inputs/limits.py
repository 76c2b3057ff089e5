"""What one task may bring.

In: settings, and the name of an app. Out: the limits of this app's tasks, and errors with both numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from legit_worker.errors import InvalidInputError
from legit_worker.settings import LIMITS, Amount, Settings


@dataclass(frozen=True)
class Limits:
    """The limits of one app's tasks: see `settings.schema.Limits` for what each bounds."""

    max_items: int
    max_characters: int
    max_image_bytes: int
    max_pixels: int
    max_task_pixels: int
    image_formats: tuple[str, ...]

    def check_count(self, items: Sequence[Any], name: str) -> None:
        """Raise `InvalidInputError` if a list has no items, or too many."""
        if not items:
            raise InvalidInputError(f"{name} is an empty list: send at least one item")
        if len(items) > self.max_items:
            raise InvalidInputError(
                f"{name} has {len(items)} items and one task takes {self.max_items}: send several tasks"
            )

    def check_pixels(self, pixels: int, count: int) -> None:
        """Raise `InvalidInputError` if the first `count` images of a task have too many pixels together."""
        if pixels > self.max_task_pixels:
            raise InvalidInputError(
                f"the first {count} images have {pixels} pixels and one task takes {self.max_task_pixels}: "
                "send several tasks, or smaller images"
            )


def limits_of(chosen: Settings, app: str | None) -> Limits:
    """The app's own limits. If it has none of its own, the limit of all apps counts."""
    own = chosen.apps.get(app) if app else None
    found = {name: getattr(own, name, None) for name in LIMITS}
    return Limits(**{name: _number(getattr(chosen, name) if mine is None else mine) for name, mine in found.items()})


def _number(value: Any) -> Any:
    """An amount of memory in bytes; anything else as it is."""
    return value.of(0) if isinstance(value, Amount) else value
