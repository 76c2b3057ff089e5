"""Accounts for every task of a run of chaos: done once, done again and why, failed, dead-lettered, or lost.

In: `Evidence`, all that was noted of the tasks, of workers and of servers. Out: one `Verdict` for each task. Pure.

A task may run again only for a reason: its message was sent again; or, while it ran or before its message was acked,
its worker died, or was stopped for longer than its lease, or a connection broke. All other runs are mistakes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from chaos_plan import Errand

#: Seconds in which a worker acks a task that has ended, if nothing is in its way: a batch, and other tasks' own code.
ACK_SECONDS = 3.0
#: Seconds in which it does so once a server or a connection that was away is back: clients try again after a while.
RECOVERY_SECONDS = 15.0
#: Seconds for which a worker may hold a message before its task begins; the message may be given to another meanwhile.
HELD_SECONDS = 10.0
#: Deliveries after which a message is dead: `LEGIT_WORKER_MAX_DELIVERIES`.
MAX_DELIVERIES = 5
#: Celery's final states.
FINAL = ("SUCCESS", "FAILURE", "REVOKED")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One execution. Times are those of this machine's monotonic clock."""

    attempt: int
    pid: int
    begin: float
    end: float = math.inf
    #: `returns`, `raises`, or None if it never ended.
    how: str | None = None
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something that keeps a worker from acking."""

    what: str
    begin: float
    end: float
    #: The worker, or None for all of them.
    pid: int | None = None
    #: Whether tasks may run again for it; else it only delays their acks.
    is_reason: bool = True


@dataclass(frozen=True, kw_only=True)
class Death:
    """A worker's end that was no peaceful one."""

    #: When it was told to end, or may have begun to.
    begin: float
    end: float
    how: str
    #: Whether it got a signal, and did not end by what it ran.
    is_told: bool = True


@dataclass(frozen=True, kw_only=True)
class Letter:
    """An envelope that an app got."""

    attempt: int
    status: str
    #: The result, or the error's type.
    value: Any


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known at the end."""

    runs: Mapping[str, Sequence[Run]]
    #: How often each message was sent, or may have been: an answer that is lost says nothing.
    sent: Mapping[str, int]
    #: Celery's state, and the result or the error's type.
    stored: Mapping[str, tuple[str, Any]]
    letters: Mapping[str, Sequence[Letter]] = field(default_factory=dict)
    #: Dead letters' reasons.
    dead: Mapping[str, Sequence[str]] = field(default_factory=dict)
    #: Of each worker that did not end in peace: from when on it was dying, when it was dead, and how.
    deaths: Mapping[int, Death] = field(default_factory=dict)
    troubles: Sequence[Trouble] = ()
    #: Whether workers move a message by sending it again, as on RabbitMQ: one that dies meanwhile leaves two.
    moves: bool = False

    @cached_property
    def troubles_of(self) -> Mapping[int, Sequence[Trouble]]:
        """By worker, in their order."""
        pids = {run.pid for runs in self.runs.values() for run in runs}
        in_order = sorted(self.troubles, key=lambda trouble: trouble.begin)
        return {pid: [trouble for trouble in in_order if trouble.pid in (None, pid)] for pid in pids}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one task."""

    errand: Errand
    #: `done`, `own error`, `chord error`, `dead letter`, `lost`, or `wrong`.
    end: str
    #: Why it ran again: one reason for each further run.
    again: tuple[str, ...] = ()
    #: What nothing explains.
    problems: tuple[str, ...] = ()


def read_notes(lines: Iterable[str]) -> Iterator[list[Any]]:
    """What tasks have noted in these lines. A worker that is killed while it writes may leave half a line: no end."""
    for line in filter(None, lines):
        with suppress(ValueError):
            yield json.loads(line)


def runs_of(notes: Iterable[Sequence[Any]]) -> dict[str, list[Run]]:
    """The notes `(id, attempt, pid, run, time, what, value)` of `chaos_project`, as runs in their order."""
    runs: dict[str, list[Run]] = defaultdict(list)
    begun: dict[tuple[int, int], int] = {}
    for name, attempt, pid, number, at, what, value in notes:
        if what == "begins":
            begun[pid, number] = len(runs[name])
            runs[name].append(Run(attempt=attempt, pid=pid, begin=at))
        else:
            place = begun[pid, number]
            runs[name][place] = replace(runs[name][place], end=at, how=what, value=value)
    return runs


def judge(errands: Sequence[Errand], evidence: Evidence) -> list[Verdict]:
    """One verdict for each errand, in their order."""
    return [_judge(errand, evidence) for errand in errands]


def _judge(errand: Errand, evidence: Evidence) -> Verdict:
    end, problems = _end(errand, evidence)
    again = list(_again(errand, evidence))
    problems += [f"ran again for no reason ({reason[1:]})" for reason in again if reason.startswith("?")]
    problems += _letters(errand, evidence)
    reasons = tuple(reason for reason in again if not reason.startswith("?"))
    return Verdict(errand=errand, end=end, again=reasons, problems=tuple(problems))


def _end(errand: Errand, evidence: Evidence) -> tuple[str, list[str]]:
    """How it ended, and what is wrong with that."""
    runs, wanted = evidence.runs.get(errand.id, ()), errand.kind.end
    is_dead = errand.id in evidence.dead
    if errand.id not in evidence.stored:
        if is_dead:
            return "wrong", [f"a dead letter without a result: {evidence.dead[errand.id][0]}"]
        return "lost", [f"lost: {_told(runs)}"]
    state, value = evidence.stored[errand.id]
    seen = state if state == "SUCCESS" else value
    if is_dead and seen == "PoisonedMessageError" and _was_killed_enough(runs, evidence):
        return "dead letter", []
    if seen == "ChordError" and _was_away(errand, evidence):
        return "chord error", []
    if seen != wanted:
        return "wrong", [f"ended with {seen} in place of {wanted}: {_told(runs)}"]
    if wanted == "PoisonedMessageError":
        return "dead letter", [] if is_dead else ["poisoned, and not among the dead letters"]
    problems = [f"a dead letter, too: {evidence.dead[errand.id][0]}"] if is_dead else []
    if state == "SUCCESS" and not any(run.how == "returns" and run.value == value for run in runs):
        problems.append(f"its result {value!r:.60} is not what it returned: {_told(runs)}")
    return ("done" if state == "SUCCESS" else "own error"), problems


def _was_away(errand: Errand, evidence: Evidence) -> bool:
    """Whether a server was away as a chord's parts ended: then Celery fails the body, under any pool."""
    parts = [run for parent in errand.parents for run in evidence.runs.get(parent, ())]
    return any(
        trouble.pid is None and trouble.end >= run.begin and trouble.begin <= run.end + ACK_SECONDS
        for run in parts
        for trouble in evidence.troubles
    )


def _was_killed_enough(runs: Sequence[Run], evidence: Evidence) -> bool:
    """Whether it was delivered so often to workers that were killed that it may be taken for the one that kills.

    A worker that was stopped beyond its lease was taken for dead. A worker that died before the task began, which
    counts, too, may be any that died so far. But the last delivery is alone: a neighbour that kills its worker is no
    reason.
    """
    killed = [evidence.deaths[run.pid] for run in runs if run.how is None and run.pid in evidence.deaths]
    stopped = sum(_was_stopped(run, evidence) for run in runs if run.pid not in evidence.deaths or run.how is not None)
    if not (stopped or (killed and killed[-1].is_told)):
        return False
    so_far = sum(death.begin <= killed[-1].end for death in evidence.deaths.values()) if killed else 0
    return max(len(killed), so_far) + stopped >= MAX_DELIVERIES


def _was_stopped(run: Run, evidence: Evidence) -> bool:
    """Whether its worker was stopped beyond its lease while it ran."""
    return any(
        trouble.is_reason and trouble.pid == run.pid and trouble.begin <= run.end and trouble.end >= run.begin
        for trouble in evidence.troubles_of[run.pid]
    )


def _told(runs: Sequence[Run]) -> str:
    """The runs in words."""
    told = [f"attempt {run.attempt} {run.how or 'began'} {run.value or ''}".rstrip() for run in runs]
    return ", ".join(told) or "it never ran"


def _again(errand: Errand, evidence: Evidence) -> Iterable[str]:
    """The reason for each run after an attempt's first; with a question mark in front if there is none."""
    by_attempt: dict[int, list[Run]] = defaultdict(list)
    for run in evidence.runs.get(errand.id, ()):
        by_attempt[run.attempt].append(run)
    for attempt, runs in by_attempt.items():
        for place, later in enumerate(runs[1:], 1):
            yield _reason(errand, attempt, runs[:place], later, evidence)


def _reason(errand: Errand, attempt: int, earlier: Sequence[Run], later: Run, evidence: Evidence) -> str:
    for run in reversed(earlier):
        if run.value == "Reject":
            return "it could not send its retry"
        reason = _came_back(run, later, evidence)
        if reason:
            return reason
    if evidence.sent.get(errand.id, 0) > 1:
        return "its message was sent again"
    if evidence.moves and any(death.begin <= later.begin for death in evidence.deaths.values()):
        return "a worker died that moves messages"
    if _senders_ran_again(errand, attempt, evidence):
        return "the task that sends it ran again"
    if _was_sent_in_trouble(errand, attempt, evidence):
        return "a server or a connection was away as a task sent it"
    last = earlier[-1]
    return f"?{last.how or 'began'} at {last.end if last.how else last.begin:.2f}, again at {later.begin:.2f}"


def _came_back(run: Run, later: Run, evidence: Evidence) -> str | None:
    """Why the broker had this run's message again when the later run began."""
    troubles = evidence.troubles_of[run.pid]
    until = _acked_by(run, troubles)
    death = evidence.deaths.get(run.pid)
    if death and death.end >= run.begin and death.begin <= min(until, later.begin):
        return f"its worker {death.how}"
    for trouble in troubles:
        if trouble.is_reason and trouble.end + HELD_SECONDS >= run.begin and trouble.begin <= min(until, later.begin):
            return trouble.what
    for trouble in evidence.troubles_of[later.pid]:  # which had it all the time, and the first run was elsewhere
        if trouble.is_reason and trouble.begin <= run.begin and later.begin <= trouble.end + HELD_SECONDS:
            return trouble.what
    return None


def _acked_by(run: Run, troubles: Sequence[Trouble]) -> float:
    """When its message is acked at the latest. What is in the way meanwhile puts that off."""
    until = run.end + ACK_SECONDS
    for trouble in troubles:
        if trouble.begin <= until and trouble.end >= run.begin:
            until = max(until, trouble.end + RECOVERY_SECONDS)
    return until


def _senders_ran_again(errand: Errand, attempt: int, evidence: Evidence) -> bool:
    """A task may have sent another, and die before it is acked."""
    own = [run for run in evidence.runs.get(errand.id, ()) if run.attempt == attempt - 1]
    parents = [evidence.runs.get(parent, ()) for parent in errand.parents]
    sent = any(evidence.sent.get(parent, 0) > 1 for parent in errand.parents)
    return sent or any(len(runs) > 1 for runs in (own, *parents))


def _was_sent_in_trouble(errand: Errand, attempt: int, evidence: Evidence) -> bool:
    """Whether the task that sent it may have had no answer, and sent it again: a task's retry, or a chord's body."""
    own = [run for run in evidence.runs.get(errand.id, ()) if run.attempt == attempt - 1]
    parents = [run for parent in errand.parents for run in evidence.runs.get(parent, ())]
    return any(
        trouble.pid is None and trouble.begin <= run.end + ACK_SECONDS and trouble.end >= run.begin
        for run in (*own, *parents)
        for trouble in evidence.troubles
    )


def _letters(errand: Errand, evidence: Evidence) -> list[str]:
    """An app gets each end, perhaps twice, and no other one."""
    letters, kind = evidence.letters.get(errand.id, ()), errand.kind
    if kind.app is None or errand.id not in evidence.stored:
        return [f"app {kind.app} got {len(letters)} envelopes of it"] if kind.app is None and letters else []
    if not letters:
        return [f"app {kind.app} got no envelope"]
    state, value = evidence.stored[errand.id]
    ends = {(letter.attempt, letter.status, repr(letter.value)) for letter in letters}
    if ends != {(kind.last_attempt + 1, state, repr(value))}:
        return [f"app {kind.app} got {sorted(ends)!r:.200}, and stored is {state} {value!r:.60}"]
    return []
