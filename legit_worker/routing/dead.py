"""The dead letters of a broker: poisoned and unreadable messages, and results that did not reach their app.

In: words that select letters: kinds, apps, ids. Out: the letters; sent again, or deleted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from celery import Celery
from kombu import Connection

from legit_worker.errors import RoutingError
from legit_worker.routing.boxes import Box, apps_with_letters, box
from legit_worker.routing.letters import POISONED, UNREADABLE, Kind, Letter, dead_queue, read
from legit_worker.routing.replay import Replayer
from legit_worker.routing.wires import connect, is_redis, reach
from legit_worker.settings import NAME, Settings, with_bounds

#: The words that select all letters of a kind.
KINDS: dict[str, Kind] = {"poisoned": "poisoned", "unreadable": "unreadable", "results": "result"}

#: The most reasons that an error names.
MAX_REASONS = 3


@dataclass
class Outcome:
    """What became of the selected letters."""

    #: How many were sent again, or deleted.
    done: int = 0
    #: Why others were kept, and how many for each reason.
    kept: Counter[str] = field(default_factory=Counter)

    @property
    def why(self) -> str:
        """The reasons in one sentence."""
        reasons = [f"{count} kept: {reason}" for reason, count in self.kept.most_common(MAX_REASONS)]
        return "; ".join(reasons).replace("\n", " ")


@dataclass(frozen=True)
class Place:
    """A box, and whose letters it has."""

    kind: Kind
    app: str | None
    box: Box


class DeadLetters:
    """The dead letters that `celery legit dead` and `celery legit results` show and move."""

    def __init__(self, app: Celery, chosen: Settings) -> None:
        self._app = app
        self._chosen = with_bounds(chosen)

    def counts(self) -> dict[str, int]:
        """Count the dead letters of each configured app."""
        with self._connected() as connection:
            return {name: len(box(connection, dead_queue(name))) for name in self._chosen.apps}

    def totals(self) -> dict[str, int]:
        """Count all dead letters: by `poisoned`, `unreadable`, and `results of APP`, without those that have none."""
        with self._connected() as connection:
            places = self._places(connection)
            counts = {f"results of {place.app}" if place.app else place.kind: len(place.box) for place in places}
        return {name: count for name, count in counts.items() if count}

    def letters(self, *words: str) -> Iterator[Letter]:
        """Yield the selected letters, or all. Raises `RoutingError` if a word selects none."""
        with self._connected() as connection:
            for letter, _ in self._selected(connection, words):
                yield letter

    def drop(self, *words: str) -> Outcome:
        """Delete the selected letters, or all."""
        outcome = Outcome()
        with self._connected() as connection:
            for _, remove in self._selected(connection, words):
                remove()
                outcome.done += 1
        return outcome

    def replay(self, *words: str, queue: str | None = None) -> Outcome:
        """Send the selected letters again, or all. A letter is deleted only when its server has it.

        A result goes to where its app's settings say now, or to the queue that its message asked for. A message goes to
        `queue`, by default the one that it came from.
        """
        outcome = Outcome()
        with self._connected() as connection:
            replayer = Replayer(self._app, self._chosen, connection, self._prefix(), queue)
            try:
                for letter, remove in self._selected(connection, words):
                    reason = replayer.send(letter)
                    if reason:
                        outcome.kept[reason] += 1
                    else:
                        remove()
                        outcome.done += 1
            finally:
                replayer.close()
        return outcome

    def known_app(self, name: str, *, configured: bool = False) -> str:
        """Return an app's name if it is configured, or has letters. Raises `RoutingError` that names the others."""
        if not re.fullmatch(NAME, name):
            raise RoutingError(f"{name!r} is no app's name")
        if name not in self._chosen.apps:
            so = "so nobody knows where its results go" if configured else "and it has no dead letters"
            with self._connected() as connection:
                if configured or not len(box(connection, dead_queue(name))):
                    known = ", ".join(self._chosen.apps) or "none"
                    raise RoutingError(f"no app {name!r} is configured, {so}; there are: {known}")
        return name

    def _selected(self, connection: Connection, words: tuple[str, ...]) -> Iterator[tuple[Letter, Callable[[], None]]]:
        places = self._places(connection, words)
        missing = set(words) - KINDS.keys() - {place.app for place in places}
        ids = frozenset(missing)
        selected = 0
        for place in places:
            is_whole = not words or place.app in words or any(KINDS.get(word) == place.kind for word in words)
            for raw, remove in place.box.items() if is_whole or ids else ():
                letter = read(raw, place.kind)
                if is_whole or letter.id in ids:
                    missing.discard(letter.id)
                    selected += 1
                    yield letter, remove
        if missing:
            raise RoutingError(
                f"no dead letter has the id, and no app the name, {', '.join(map(repr, sorted(missing)))}; kinds are "
                f"{', '.join(KINDS)}, and apps {', '.join(self._chosen.apps) or 'none'}"
                f"{f'. The other words select {selected}, and that is done' if selected else ''}"
            )

    def _places(self, connection: Connection, words: tuple[str, ...] = ()) -> list[Place]:
        """Return all boxes. Letters outlive their app's settings, so an app may have some and not be configured."""
        others = {word for word in words if re.fullmatch(NAME, word)} - KINDS.keys() - self._chosen.apps.keys()
        unnamed = {app for app in others if len(box(connection, dead_queue(app)))}
        apps = dict.fromkeys([*self._chosen.apps, *apps_with_letters(connection), *sorted(unnamed)])
        places = [Place("poisoned", None, box(connection, POISONED, self._prefix()))]
        if is_redis(connection):
            places.append(Place("unreadable", None, box(connection, UNREADABLE, self._prefix())))
        return places + [Place("result", app, box(connection, dead_queue(app))) for app in apps]

    def _prefix(self) -> str:
        return str(self._app.connection_for_write().transport_options.get("global_keyprefix") or "")

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with connect(self._app, None) as connection:
            try:
                reach(connection)
            except (OSError, *connection.connection_errors) as error:
                raise RoutingError(f"the broker {connection.as_uri()} does not answer: {error}") from None
            yield connection
