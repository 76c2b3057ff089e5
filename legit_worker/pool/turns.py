"""Whose turn it is: tasks that park with something open which others need, and tasks that park until it is free.

In: who is about to need a thing, and whether that is free. Out: the order in which they get it, a word to the loop when
the first of them can go on, and whether a task may let others run at a model call. Pure: knows no database.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakSet

if TYPE_CHECKING:
    from legit_worker.pool.fibers import Fiber

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Claim(Protocol):
    """Why a task has the turn."""

    #: What it is about.
    about: Callable[[], Any]

    def is_held(self) -> bool:
        """Whether it still needs the turn."""


class Shared(Protocol):
    """What a task works with, and others may, too."""

    def keeps_others_out(self) -> bool:
        """Whether other tasks would find it in the middle of this task's work."""


class Holdings:
    """What one task has. Lives on the main thread."""

    def __init__(self) -> None:
        #: The gates that it went through, until it parks without a need for them.
        self.gates: list[Gate] = []
        #: Where it waits.
        self.stands_in: Line | None = None
        #: What it works with. Whose that is keeps it.
        self.shared: WeakSet[Shared] = WeakSet()
        #: What is one per thread elsewhere, and one per task here; and what becomes of each at the task's end.
        self.own: dict[Any, Any] = {}
        self.at_end: list[Callable[[], None]] = []

    def keep_others_out(self) -> bool:
        """Whether no other task may run now."""
        return _is_blind() or (bool(self.shared) and any(thing.keeps_others_out() for thing in self.shared))

    def review(self, fiber: Fiber) -> None:
        """The task is about to park: it keeps what it needs, and others may have the rest."""
        for gate in self.gates[:]:
            gate.review(fiber)
        look()

    def end(self, fiber: Fiber) -> None:
        """The task is over. Called within it."""
        for close in self.at_end:
            _try(close, None)
        self.own.clear()
        for gate in self.gates[:]:
            gate.leave(fiber)
        look()


@dataclass(eq=False)
class Ticket:
    """A task's place in a line."""

    fiber: Fiber
    #: Done once the task may look whether it can go on.
    called: Future[None] = field(default_factory=Future)


class Line:
    """Tasks that wait for one thing, first come, first served. Lives on the main thread; parks tasks, never blocks."""

    def __init__(
        self,
        waits_for: str,
        is_free: Callable[[Fiber], bool],
        holders: Callable[[Fiber], Iterable[Fiber]],
        *,
        needs_all: bool = False,
    ) -> None:
        """`holders`: the tasks any of which can make it free, or all together; none, if somebody else can."""
        self._waits_for = waits_for
        #: Whether a task could go on at once.
        self.is_free = is_free
        self._holders = holders
        self._needs = all if needs_all else any
        self._waiting: deque[Ticket] = deque()

    def __repr__(self) -> str:
        return f"<Line for {self._waits_for}: {len(self._waiting)} waiting>"

    @property
    def is_taken(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def wait(self, fiber: Fiber, *, first: bool = False) -> bool:
        """Until it is this task's turn. False if it can't wait, or if nobody it would wait for can go on.

        `first`: before those that stand there already.
        """
        if self.is_free(fiber) and (first or not self._waiting):
            return True
        if not fiber.may_wait() or not self.will_move(fiber):
            return False
        with fiber.served():
            self._stand(Ticket(fiber), 0 if first else len(self._waiting))
        return True

    def _stand(self, ticket: Ticket, place: int) -> None:
        fiber = ticket.fiber
        self._waiting.insert(place, ticket)
        _lines.add(self)
        fiber.holdings.stands_in = self
        try:
            while ticket is not self._waiting[0] or not self.is_free(fiber):
                ticket.called = Future()
                fiber.wait_for(ticket.called, self._waits_for)
        finally:
            fiber.holdings.stands_in = None
            self._waiting.remove(ticket)
            if not self._waiting:
                _lines.discard(self)

    def look(self) -> None:
        """Call the first one, if it can go on."""
        first = self._waiting[0] if self._waiting else None
        if first is not None and not first.called.done() and self.is_free(first.fiber):
            first.called.set_result(None)

    def will_move(self, fiber: Fiber, asking: frozenset[Fiber] = frozenset()) -> bool:
        """Whether those who have what this task waits for can go on without this task."""
        asking |= {fiber}
        holders = list(self._holders(fiber))
        return not holders or self._needs(_can_go_on(holder, asking) for holder in holders)


def _can_go_on(fiber: Fiber, asking: frozenset[Fiber]) -> bool:
    if fiber in asking:
        return False
    line = fiber.holdings.stands_in
    return line is None or line.will_move(fiber, asking)


class Gate:
    """Lets one task through at a time, which keeps it until it parks without a need for it. Lives on the main thread.

    A task that gives it up and takes it again before it parks was never interrupted by another.
    """

    def __init__(self, waits_for: str) -> None:
        self.line = Line(waits_for, self._is_free_for, lambda _: self._claims)
        # More than one only if somebody could not wait.
        self._claims: dict[Fiber, list[Claim]] = {}
        _gates.add(self)

    def __repr__(self) -> str:
        return f"<Gate {', '.join(fiber.name for fiber in self._claims) or 'open'}, {self.line!r}>"

    def claims(self, fiber: Fiber) -> list[Claim] | None:
        """Why this task has it; None if it has not."""
        return self._claims.get(fiber)

    def take(self, fiber: Fiber) -> list[Claim]:
        """Wait until this task is through. Returns its claims, to which the caller adds."""
        claims = self._claims.get(fiber)
        if claims is None:
            with fiber.served():  # a time limit between these lines would leave the gate closed for good
                self.line.wait(fiber)
                claims = self._claims[fiber] = []
                fiber.holdings.gates.append(self)
        return claims

    def review(self, fiber: Fiber) -> None:
        """The task parks: it keeps the gate only if it still needs it."""
        claims = self._claims[fiber]
        drop_old(claims)
        if not claims:
            self.leave(fiber)

    def leave(self, fiber: Fiber) -> None:
        """The task gives it up."""
        del self._claims[fiber]
        fiber.holdings.gates.remove(self)

    def _is_free_for(self, fiber: Fiber) -> bool:
        return all(holder is fiber or holder.dead for holder in self._claims)


def drop_old(claims: list[Claim]) -> None:
    """Leave those that are still held."""
    claims[:] = [claim for claim in claims if _try(claim.is_held, True)]


#: Those in which somebody waits.
_lines: set[Line] = set()

_gates: WeakSet[Gate] = WeakSet()


def _no() -> bool:
    return False


_is_blind: Callable[[], bool] = _no


def use(is_blind: Callable[[], bool]) -> None:
    """Ask `is_blind`, from now on, whether a task may have what nobody saw."""
    global _is_blind
    _is_blind = is_blind


def look() -> None:
    """Have those go on that can: something may have become free."""
    for line in list(_lines):
        line.look()


def wait_for_all(fiber: Fiber) -> None:
    """Until no other task is parked with a gate. Called before a task runs alone: from then on it could not wait."""
    while any(not gate.line.is_free(fiber) and gate.line.wait(fiber) for gate in tuple(_gates)):
        pass


def _try(ask: Callable[[], T], default: T) -> T:
    """What this gives. Whatever goes wrong there is not the task's error."""
    try:
        return ask()
    except Exception:
        logger.warning("a task's transaction can't be asked or closed", exc_info=True)
        return default
