"""Chains, groups and chords of tasks that park, as under stock solo: on Redis, and on RabbitMQ with results by message.

Every step calls a model, so under ModelPool many canvases are on their way at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.canvas import Signature, chunks, xmap, xstarmap
from celery.exceptions import ChordError
from celery.result import AsyncResult
from celery.utils import uuid
from harness import ANSWER_SECONDS, SIDES, Broker, Client, StartWorker, poll
from journal import Life, begin_life

#: How often each canvas is sent, all at once.
COPIES = 5


@pytest.fixture(scope="module", params=SIDES)
def life(
    request: pytest.FixtureRequest, start_module_worker: StartWorker, tmp_path_factory: pytest.TempPathFactory
) -> Life:
    """A worker under stock Celery and then one under ModelPool."""
    return begin_life(start_module_worker, tmp_path_factory.mktemp("canvas"), request.param)


@pytest.fixture(params=SIDES)
def rpc_life(request: pytest.FixtureRequest, start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker) -> Life:
    """The same on RabbitMQ, whose results are messages to the client that sent the task."""
    broker = replace(rabbitmq, backend="rpc://")
    return begin_life(start_worker, tmp_path, request.param, broker=broker)


class Steps:
    """Signatures of a client that knows no task but by its name."""

    def __init__(self, client: Client) -> None:
        self.app = client

    def add(self, *args: int) -> Signature:
        """A number and what came before."""
        return self.app.signature("add", args)

    def total(self) -> Signature:
        """The sum of what came before."""
        return self.app.signature("total")

    def fails(self) -> Signature:
        """Never answers."""
        return self.app.signature("fails")

    def group(self, *parts: Signature) -> group:
        """Beside each other."""
        return group(*parts, app=self.app)

    def chord(self, parts: list[Signature], body: Signature) -> Signature:
        """Beside each other, and then this."""
        return chord(parts, body, app=self.app)


#: Each canvas, with what it answers. `n` makes every copy's answer its own.
CANVASES: dict[str, tuple[Callable[[Steps, int], Signature], Callable[[int], Any]]] = {
    "chain": (lambda s, n: chain(s.add(n, 1), s.add(2), s.add(3)), lambda n: n + 6),
    "group": (lambda s, n: s.group(*(s.add(n, i) for i in range(5))), lambda n: [n + i for i in range(5)]),
    "group of chains": (
        lambda s, n: s.group(*(chain(s.add(n, i), s.add(10)) for i in range(3))),
        lambda n: [n + i + 10 for i in range(3)],
    ),
    "group of one": (lambda s, n: s.group(s.add(n, 1)), lambda n: [n + 1]),
    "starmap": (lambda s, n: xstarmap(s.add(), [[n, 1], [n, 2]], app=s.app), lambda n: [n + 1, n + 2]),
    "map": (lambda s, n: xmap(s.total(), [[n, 1], [n, 2]], app=s.app), lambda n: [n + 1, n + 2]),
    "chunks": (
        lambda s, n: chunks(s.add(), [[n, i] for i in range(5)], 2, app=s.app),
        lambda n: [[n, n + 1], [n + 2, n + 3], [n + 4]],
    ),
    "immutable chain": (lambda s, n: chain(s.add(n, 1), s.add(n, 5).set(immutable=True), s.add(1)), lambda n: n + 6),
    "chain of chains": (lambda s, n: chain(s.add(n, 1), chain(s.add(2), s.add(3)), s.add(4)), lambda n: n + 10),
}

#: Those that end in a chord, which rpc:// has not.
CHORDS: dict[str, tuple[Callable[[Steps, int], Signature], Callable[[int], Any]]] = {
    "chord": (lambda s, n: s.chord([s.add(n, i) for i in range(10)], s.total()), lambda n: 10 * n + 45),
    "chord with a body of steps": (
        lambda s, n: s.chord([s.add(n, i) for i in range(3)], chain(s.total(), s.add(100))),
        lambda n: 3 * n + 103,
    ),
    "chain in a chord": (
        lambda s, n: s.chord([chain(s.add(n, i), s.add(10), s.add(10)) for i in range(3)], s.total()),
        lambda n: 3 * n + 63,
    ),
    "group in a chain": (
        lambda s, n: chain(s.add(n, 1), s.group(s.add(10), s.add(20)), s.total()),
        lambda n: 2 * n + 32,
    ),
    "groups in a chain": (
        lambda s, n: chain(s.add(n, 1), s.group(s.add(1), s.add(2)), s.total(), s.group(s.add(3), s.add(4)), s.total()),
        lambda n: 2 * (2 * n + 5) + 7,
    ),
    "group in a group in a chain": (
        lambda s, n: chain(s.add(n, 1), s.group(s.group(s.add(1), s.add(2)), s.add(3)), s.app.signature("flat_total")),
        lambda n: 3 * n + 9,
    ),
    "chord in a chain in a chord": (
        lambda s, n: s.chord(
            [chain(s.chord([s.add(n, i), s.add(n, i)], s.total()), s.add(1)) for i in range(3)], s.total()
        ),
        lambda n: 6 * n + 9,
    ),
    "chord of one": (lambda s, n: s.chord([s.add(n, 1)], s.total()), lambda n: n + 1),
    "canvas from within a task": (
        lambda s, n: s.app.signature("canvas_inside", [n + 1]),
        lambda n: sum(range(n + 1)) + 11 * (n + 1),
    ),
    "chunks from within a task": (
        lambda s, n: s.app.signature("chunks_inside", [n + 4, 3]),
        lambda n: sum(2 * i for i in range(n + 4)),
    ),
    "added to a chord": (
        lambda s, n: s.chord([s.app.signature("adds_to_chord", [n]), s.add(n, 1)], s.total()),
        lambda n: 3 * n + 101,
    ),
}


@pytest.mark.parametrize("name", [*CANVASES, *CHORDS])
def test_a_canvas_answers_as_under_stock_solo(life: Life, name: str) -> None:
    if name in CHORDS:
        life.worker.broker.needs_stored_results()
    check_canvas(life, *(CANVASES | CHORDS)[name])


def test_canvases_without_chords_answer_by_message_too(rpc_life: Life) -> None:
    for canvas in CANVASES.values():
        check_canvas(rpc_life, *canvas)


@pytest.mark.parametrize("side", SIDES)
def test_chords_answer_under_rabbitmq_too(
    start_worker: StartWorker, tmp_path: Path, rabbitmq: Broker, side: str
) -> None:
    life = begin_life(start_worker, tmp_path, side, broker=rabbitmq)
    life.worker.broker.needs_stored_results()
    for canvas in CHORDS.values():
        check_canvas(life, *canvas)


def check_canvas(life: Life, make: Callable[[Steps, int], Signature], expected: Callable[[int], Any]) -> None:
    """All copies are on their way at once."""
    steps = Steps(life.worker.client)
    results = [make(steps, number).apply_async() for number in range(COPIES)]
    assert [result.get(timeout=ANSWER_SECONDS) for result in results] == [expected(number) for number in range(COPIES)]


def test_a_step_that_fails_ends_its_chain(life: Life) -> None:
    check_failing_chain(life)


def test_a_step_that_fails_ends_its_chain_by_message_too(rpc_life: Life) -> None:
    check_failing_chain(rpc_life)


def check_failing_chain(life: Life) -> None:
    """The failing step's errback runs once, each of the steps after it has its error, and none of those runs."""
    steps = Steps(life.worker.client)
    failing = steps.fails().set(task_id=uuid(), link_error=steps.app.signature("errback"))
    last = chain(steps.add(1, 2), failing, steps.app.signature("gather")).apply_async()
    middle = AsyncResult(failing.options["task_id"], app=steps.app)
    poll(lambda: life.journal.of(middle.id), "the errback")
    assert life.journal.of(middle.id) == [["errback", "ValueError", "a step failed", True]]
    if life.worker.broker.stores_results:
        for result in (middle, last):
            life.worker.settle([result])
            assert (result.state, str(result.result)) == ("FAILURE", "a step failed")
    life.send("add", 1, 1).get(timeout=ANSWER_SECONDS)  # had the last step been sent, it would have begun by now
    assert life.journal.of(last.id) == []


def test_the_members_of_a_group_fail_alone(life: Life) -> None:
    steps = Steps(life.worker.client)
    result = steps.group(steps.add(1, 1), steps.fails(), steps.add(1, 2)).apply_async()
    answers = result.get(propagate=False, timeout=ANSWER_SECONDS)
    assert [answers[0], str(answers[1]), answers[2]] == [2, "a step failed", 3]


@pytest.mark.parametrize("failing", [1, 3])
def test_errors_in_a_chords_header_are_its_bodys_error(life: Life, failing: int) -> None:
    life.worker.broker.needs_stored_results()
    steps = Steps(life.worker.client)
    body = steps.app.signature("gather").on_error(steps.app.signature("errback"))
    header = [steps.add(1, 1), *[steps.fails()] * failing, steps.add(1, 2)]
    result = steps.chord(header, body).apply_async()
    life.worker.settle([result])
    assert isinstance(result.result, ChordError)
    assert re.fullmatch(r"Dependency .* raised ValueError\('a step failed'\)", str(result.result))
    with pytest.raises(ValueError, match="a step failed"):
        result.get(timeout=1)
    poll(lambda: life.journal.of(result.id), "the errback")
    (called,) = life.journal.of(result.id)
    assert called == ["errback", "ChordError", str(result.result), False]


def test_a_chords_body_that_fails_calls_its_errback(life: Life) -> None:
    life.worker.broker.needs_stored_results()
    steps = Steps(life.worker.client)
    body = steps.fails().on_error(steps.app.signature("errback"))
    result = steps.chord([steps.add(1, 1), steps.add(1, 2)], body).apply_async()
    life.worker.settle([result])
    assert str(result.result) == "a step failed"
    poll(lambda: life.journal.of(result.id), "the errback")
    assert life.journal.of(result.id) == [["errback", "ValueError", "a step failed", True]]


def test_a_chord_is_refused_where_results_are_messages(rpc_life: Life) -> None:
    with pytest.raises(NotImplementedError, match="does not support chords"):
        rpc_life.ask("sends_chord")
