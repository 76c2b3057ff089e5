"""What a run of chaos does, drawn from its seed: which tasks are sent, and what is done to workers and servers when.

In: a number of tasks, a seed, a broker. Out: a `Plan`, the same one for the same three. Pure: nothing here looks at a
clock or at a server. Times are progress: a fault comes once so many tasks are done.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

#: Tasks of a header. Its body comes on top.
PARTS = 3
#: From this many tasks on, some call the real model: each new worker takes some seconds to load it.
REAL_FROM = 2000
#: One task in so many kills each worker that runs it: it takes down every neighbour a few times.
POISON_SHARE = 4000
#: A fault for so many tasks; in a long run fewer: so many, and one for each hundred tasks.
SPACING, MOST_FAULTS = 25, 12
#: The share of tasks after which the first fault comes, and the share after which none comes.
FIRST, LAST = 0.05, 0.9


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Tasks that are alike."""

    name: str
    #: The Celery task.
    task: str
    #: How many of them, beside the other kinds.
    weight: float = 0
    #: `SUCCESS`, or the type of the error that each of them must end with.
    end: str = "SUCCESS"
    #: The app that is to hear of the end.
    app: str | None = None
    #: Which attempt is the last one, from 0.
    last_attempt: int = 0
    #: Seconds from when it is sent until it is due.
    countdown: float = 0


PART = Kind(name="chord's part", task="adds_one", weight=3 * PARTS)
BODY = Kind(name="chord's body", task="adds_up")
REAL = Kind(name="real model", task="embeds", weight=1)
POISON = Kind(name="kills its worker", task="kills", end="PoisonedMessageError", app="here")
KINDS = (
    Kind(name="no model", task="adds_one", weight=25),
    Kind(name="model", task="computes", weight=25),
    Kind(name="model short of memory", task="computes_tightly", weight=8),
    Kind(name="own code", task="sleeps", weight=4),
    Kind(name="own error", task="fails", weight=5, end="ValueError"),
    Kind(name="retried twice", task="retries", weight=5, last_attempt=2),
    Kind(name="ETA", task="adds_one", weight=3, countdown=3),
    Kind(name="ETA beyond the visibility timeout", task="adds_one", weight=0.5, countdown=20),
    Kind(name="soft time limit", task="is_too_slow", weight=0.3, end="SoftTimeLimitExceeded"),
    Kind(name="hard time limit", task="is_much_too_slow", weight=0.3, end="TimeLimitExceeded"),
    Kind(name="routed, the broker's server", task="computes", weight=7, app="here"),
    Kind(name="routed, another server", task="computes", weight=7, app="there"),
    Kind(name="routed error", task="fails", weight=1.5, end="ValueError", app="here"),
    Kind(name="routed and retried", task="retries", weight=1.5, app="there", last_attempt=2),
    PART,
)


@dataclass(frozen=True, kw_only=True)
class Errand:
    """One task that is to be done."""

    id: str
    kind: Kind
    #: Its argument: no two are alike.
    number: int
    #: The tasks whose ends send this one; a chord's body has some.
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    what: str
    #: It comes once so many tasks are done.
    at: int
    #: Which worker or which server, modulo their number.
    target: int
    #: How long it lasts, where it lasts: this share of the longest.
    share: float


#: What happens to workers, whatever the broker; one that is there twice is twice as frequent.
WORKER_FAULTS = (
    *("kill -9 a worker",) * 3,
    "QUIT a worker",
    "TERM a worker",
    "stop a worker for a moment",
    "stop a worker beyond its lease",
    "short of memory",
)
#: What happens to connections and to servers of results, whatever the broker.
SERVER_FAULTS = (
    *("cut connections", "kill -9 a server") * 2,
    "refuse connections",
    "restart a server",
    "freeze a server",
    "fill a server",
    "CLIENT KILL",
    "CLIENT PAUSE",
    "garbage",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a seed decides."""

    errands: tuple[Errand, ...]
    faults: tuple[Fault, ...]
    workers: int
    #: Whether results have a server of their own.
    apart: bool
    #: RabbitMQ: whether the queue is a quorum queue, which counts deliveries.
    quorum: bool


def plan(tasks: int, seed: int, broker: str, run: str = "") -> Plan:
    """The same plan for the same arguments, in every Python; with ids of this run."""
    random = Random(seed)
    workers, apart, quorum = random.choice((2, 3)), seed % 2 == 0, seed % 2 == 1
    counts_deliveries = broker == "redis" or quorum
    errands = tuple(_errands(random, tasks, counts_deliveries, run))
    return Plan(
        errands=errands,
        faults=tuple(_faults(random, len(errands))),
        workers=workers,
        apart=apart or broker != "redis",
        quorum=quorum,
    )


def _errands(random: Random, tasks: int, has_poison: bool, run: str) -> Iterator[Errand]:
    """Each kind at least once, in any order; a chord's body follows its parts."""
    kinds = (*KINDS, REAL) if tasks >= REAL_FROM else KINDS
    poison = [POISON] * max(1, tasks // POISON_SHARE) * has_poison
    total = sum(kind.weight for kind in kinds) + PART.weight / PARTS
    units: list[Kind] = [*poison]
    for kind in kinds:
        share = kind.weight / (PARTS if kind is PART else 1) / total
        units += [kind] * max(1, round((tasks - len(poison)) * share))
    random.shuffle(units)
    number = 0
    for kind in units:
        made = _chord(run, number) if kind is PART else [_errand(run, kind, number)]
        number += len(made)
        yield from made


def _chord(run: str, number: int) -> list[Errand]:
    parts = [_errand(run, PART, number + place) for place in range(PARTS)]
    return [*parts, _errand(run, BODY, number + PARTS, tuple(part.id for part in parts))]


def _errand(run: str, kind: Kind, number: int, parents: tuple[str, ...] = ()) -> Errand:
    name = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{run} {number}"))
    return Errand(id=name, kind=kind, number=number, parents=parents)


def _faults(random: Random, tasks: int) -> Iterator[Fault]:
    """Evenly over the run; each once before one of them comes again."""
    count = min(tasks // SPACING, MOST_FAULTS + tasks // 100)
    deck: list[str] = []
    for place in range(count):
        if not deck:
            deck = random.sample(WORKER_FAULTS + SERVER_FAULTS, len(WORKER_FAULTS + SERVER_FAULTS))
        at = round(tasks * (FIRST + (LAST - FIRST) * place / count))
        yield Fault(what=deck.pop(), at=at, target=random.randrange(6), share=random.random())
