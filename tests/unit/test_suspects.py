"""Which messages are suspects, how many tasks run beside them, and which messages go to tasks that run already."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from math import inf
from time import monotonic
from types import SimpleNamespace
from typing import Any

import kombu
import pytest

from legit_worker.broker.behind import ACQUIRED, ADDRESS, COUNT, VOUCHED
from legit_worker.broker.poison import deliveries_of
from legit_worker.broker.returning import DELIVERIES
from legit_worker.pool import suspects
from legit_worker.pool.adoption import Adoption
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.running import Running
from legit_worker.pool.suspects import ROUTING_KEY, ROW_SECONDS, Suspects

MOST = 3


class Channel:
    """An AMQP channel, as far as messages use it."""

    def __init__(self) -> None:
        self.connection: Any = object()
        self.no_ack_consumers: set[str] = set()
        self.acked: list[int] = []

    def basic_ack(self, tag: int, multiple: bool = False) -> None:
        """Note it, or say that the connection is gone."""
        if self.connection is None:
            raise ConnectionError("gone")
        self.acked.append(tag)


class Request(SimpleNamespace):
    """Celery's request, of which Celery keeps weak references."""

    __hash__ = object.__hash__
    _on_ack: Any = None
    _on_reject: Any = None

    @property
    def message(self) -> Any:
        """As Celery's."""
        return self._message


class Behind:
    """Notes the copies."""

    def __init__(self) -> None:
        self.copies: list[tuple[str, str, int]] = []
        self.vouched: list[int] = []

    def put(self, message: kombu.Message, queue: str, deliveries: int, vouched: int) -> bool:
        """RabbitMQ takes each."""
        self.vouched.append(vouched)
        self.copies.append((message.headers["id"], queue, deliveries))
        return True

    def close(self) -> None:
        """Nothing is open."""


def message(identity: str, channel: Channel, *, tag: int = 1, again: bool = False, **headers: Any) -> kombu.Message:
    """A task's message as RabbitMQ delivers it."""
    return kombu.Message(
        b"",
        channel=channel,
        delivery_tag=tag,
        headers={"id": identity, "task": "one", **headers},
        delivery_info={"redelivered": again, "consumer_tag": "tag", "exchange": "", "routing_key": "work"},
    )


class Worker:
    """The parts that look at messages, and a consumer whose handler keeps those that must run."""

    def __init__(self) -> None:
        self.running = Running()
        self.suspects = Suspects(MOST)
        self.behind = self.suspects._behind = Behind()  # type: ignore[assignment]
        self.adoption = Adoption(self.running, self.suspects)
        self.to_run: list[kombu.Message] = []
        self.told: list[list[tuple[str, int]]] = []
        self.consumer = SimpleNamespace(
            connection_errors=(ConnectionError,),
            create_task_handler=lambda: self.to_run.append,
            call_soon_ack=lambda call, *args: call(*args),
            task_consumer=SimpleNamespace(_active_tags={"work": "tag"}),
            hostname="this",
            gossip=SimpleNamespace(event_handlers={}),
            event_dispatcher=SimpleNamespace(send=lambda event, keys: self.told.append(keys)),
        )
        self.adoption.meet(self.consumer)
        self.receive = self.consumer.create_task_handler()

    def begin(self, received: kombu.Message) -> Fiber:
        """Start the task of a message that must run."""
        request = Request(
            id=received.headers["id"],
            request_dict=received.headers,
            _message=received,
            acknowledged=False,
            _already_cancelled=False,
        )
        fiber = Fiber(lambda: None, app="", name=request.id, request=request)
        self.suspects.add(fiber)
        self.running.add(fiber)
        return fiber

    def end(self, received: kombu.Message) -> None:
        """Ack a message as a task's end does."""
        self.consumer.call_soon_ack(received.ack_log_error, None, (ConnectionError,))


@pytest.fixture
def worker() -> Worker:
    """One that has nothing."""
    return Worker()


def test_a_message_of_a_classic_queue_that_came_before_goes_behind_with_its_count(worker: Worker) -> None:
    worker.receive(message("a", Channel(), again=True))
    assert (worker.behind.copies, worker.to_run) == ([("a", "work", 1)], [])


def test_a_copy_runs_alone_and_looks_as_it_first_came(worker: Worker) -> None:
    copy = message("a", Channel(), **{DELIVERIES: 1, ADDRESS: ["tasks", "key"]})
    worker.receive(copy)
    assert worker.to_run == [copy]
    assert copy.headers == {"id": "a", "task": "one"}
    assert copy.delivery_info["exchange"], copy.delivery_info["routing_key"] == ("tasks", "key")
    assert copy.delivery_info["redelivered"]
    fiber = worker.begin(copy)
    assert worker.suspects.bound == 1
    worker.receive(message("b", Channel(), **{DELIVERIES: 1}))
    assert worker.behind.copies == [("b", "work", 1)], "one suspect at a time, and the others keep their counts"
    worker.suspects.discard(fiber)
    worker.receive(message("c", Channel()))
    assert worker.suspects.bound == inf


def test_a_suspect_that_waits_for_its_apps_limits_keeps_nothing_back(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked: set[Fiber] = set()
    worker.suspects.is_blocked = blocked.__contains__
    first = message("a", Channel(), **{DELIVERIES: 1})
    worker.receive(first)
    blocked.add(worker.begin(first))
    monkeypatch.setattr(suspects, "monotonic", lambda: monotonic() + ROW_SECONDS)
    assert worker.suspects.bound == inf
    second = message("b", Channel(), **{DELIVERIES: 1})
    worker.receive(second)
    assert (worker.to_run, worker.behind.copies) == ([first, second], []), "nor does it send others behind"
    worker.begin(second)
    assert worker.suspects.bound == 1
    blocked.clear()
    worker.suspects.discard(*(fiber for fiber in worker.suspects._fibers if fiber.name == "b"))
    assert worker.suspects.bound == 1


def test_a_suspect_that_went_behind_keeps_nothing_back_for_long(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.receive(message("a", Channel(), again=True))
    assert worker.suspects.bound == 1, "another may come right after it"
    monkeypatch.setattr(suspects, "monotonic", lambda: monotonic() + ROW_SECONDS)
    assert worker.suspects.bound == inf


@pytest.mark.parametrize("counted", [1, 6])
def test_whatever_a_quorum_queue_has_counted_since_the_last_copy_is_one(worker: Worker, counted: int) -> None:
    """RabbitMQ delivers messages that no worker has read when its connection breaks, and counts them."""
    worker.receive(message("a", Channel(), again=True, **{COUNT: counted}))
    worker.receive(message("b", Channel(), again=True, **{COUNT: counted, DELIVERIES: 1}))
    assert (worker.behind.copies, worker.to_run) == ([("a", "work", 1), ("b", "work", 2)], [])


def test_what_a_quorum_queue_got_back_without_a_failure_is_no_death(worker: Worker) -> None:
    """From RabbitMQ 4.3 on: after a `basic.nack`, a consumer that timed out, a part of a cluster that was cut off."""
    again = message("a", Channel(), again=True, **{ACQUIRED: 3})
    worker.receive(again)
    assert (worker.to_run, worker.behind.copies, worker.suspects.bound) == ([again], [], inf)
    assert deliveries_of(again) == 0


@pytest.mark.parametrize("acquired", [1, 5])
def test_what_a_quorum_queue_calls_a_failure_may_be_a_death(worker: Worker, acquired: int) -> None:
    worker.receive(message("a", Channel(), again=True, **{COUNT: 1, ACQUIRED: acquired}))
    worker.receive(message("b", Channel(), again=True, **{COUNT: 2, ACQUIRED: acquired + 1, DELIVERIES: 1}))
    assert (worker.behind.copies, worker.to_run) == ([("a", "work", 1), ("b", "work", 2)], [])


@pytest.mark.parametrize("headers", [{}, {COUNT: 4}, {DELIVERIES: 2}])
def test_a_task_whose_time_has_not_come_killed_no_worker(worker: Worker, headers: dict[str, Any]) -> None:
    """Workers that wait for it may die one after the other; on a classic queue it would wait behind the others."""
    later, earlier = ((datetime.now(timezone.utc) + timedelta(minutes=minutes)).isoformat() for minutes in (1, -1))
    waits = message("a", Channel(), again=True, eta=later, **headers)
    worker.receive(waits)
    assert (worker.to_run, worker.behind.copies) == ([waits], [])
    worker.begin(waits)
    assert worker.suspects.bound == inf
    assert deliveries_of(waits) == 0
    worker.receive(message("b", Channel(), again=True, eta=earlier))
    assert worker.behind.copies == [("b", "work", 1)]


def test_of_the_suspects_that_a_dead_worker_had_only_the_first_has_killed_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for identity in ("a", "b", "c"):
        worker.receive(message(identity, Channel(), again=True, **{COUNT: 1, DELIVERIES: 1}))
    assert worker.behind.copies == [("a", "work", 2)]
    assert [one.delivery_info[DELIVERIES] for one in worker.to_run] == [1, 1], "they run alone, and lose no delivery"
    monkeypatch.setattr(suspects, "monotonic", lambda: monotonic() + ROW_SECONDS)
    worker.receive(message("d", Channel(), again=True, **{COUNT: 1, DELIVERIES: 1}))
    assert worker.behind.copies[1:] == [("d", "work", 2)]


def test_if_no_copy_can_be_made_the_queues_own_count_is_taken(worker: Worker) -> None:
    worker.behind.put = lambda *_: False  # type: ignore[method-assign]
    worker.receive(message("a", Channel(), again=True, **{COUNT: 2}))
    assert [each.delivery_info[DELIVERIES] for each in worker.to_run] == [2]


def test_a_message_that_came_too_often_goes_on_to_its_end_and_holds_up_nobody(worker: Worker) -> None:
    last = message("a", Channel(), again=True, **{DELIVERIES: MOST - 1})
    worker.receive(last)
    worker.begin(last)
    assert (worker.to_run, worker.behind.copies, worker.suspects.bound) == ([last], [], inf)


@pytest.mark.parametrize("headers", [{}, {COUNT: 1}], ids=["classic", "quorum"])
def test_what_a_worker_gives_back_and_lives_is_no_suspect(worker: Worker, headers: dict[str, Any]) -> None:
    worker.receive(message("a", Channel()))
    worker.adoption.lost()
    again = message("a", Channel(), again=True, **headers)
    worker.receive(again)
    assert (worker.to_run[1:], worker.behind.copies, worker.suspects.bound) == ([again], [], inf)


def test_what_another_worker_that_lives_gave_back_is_no_death(worker: Worker) -> None:
    hear = worker.consumer.gossip.event_handlers[ROUTING_KEY]
    worker.receive(message("a", Channel(), again=True))
    hear({"hostname": "other", "keys": [["a", 0], ["b", 0], [5, None], "strange"]})
    hear({"hostname": "this", "keys": [["a", 0]]})
    for strange in (5, "ab", {"a": 0}, [None, {"id": 1}, ["a", "b"], [["a"], 0]]):
        hear({"hostname": "other", "keys": strange})
    hear({"hostname": "other"})
    running = message("d", Channel(), **{DELIVERIES: 1})
    worker.receive(running)
    worker.begin(running)
    assert worker.suspects.bound == 1
    hear({"hostname": "other", "keys": [["d", 0]]})
    assert worker.suspects.bound == inf, "others need not wait for it"
    copy = message("a", Channel(), **{DELIVERIES: 1})
    worker.receive(copy)
    assert worker.to_run == [running, copy], "it runs beside others"
    assert (copy.delivery_info[DELIVERIES], worker.suspects.bound) == (0, inf)
    worker.receive(message("b", Channel(), again=True))
    assert worker.behind.copies == [("a", "work", 1), ("b", "work", 1)], "a death must not be taken for this, later"
    assert worker.behind.vouched == [0, 1]
    worker.receive(message("c", Channel(), **{DELIVERIES: MOST + 1, VOUCHED: 2}))
    assert worker.to_run[-1].delivery_info[DELIVERIES] == MOST - 1, "what a copy says is known to who started later"
    assert VOUCHED not in worker.to_run[-1].headers


def test_a_worker_that_lives_tells_what_it_gave_back_and_did_not_get_again(worker: Worker) -> None:
    for identity in ("a", "b", "c"):
        worker.receive(message(identity, Channel()))
    worker.end(worker.to_run[2])
    worker.suspects.vouch()
    assert worker.told == []
    worker.adoption.lost()
    worker.receive(message("b", Channel(), again=True))
    worker.suspects.vouch()
    assert worker.told == [[("a", 0)]]
    worker.receive(message("a", Channel(), again=True))
    assert worker.behind.copies == [("a", "work", 1)], "by now, another may have had it"
    assert worker.behind.vouched == [1]
    worker.suspects.vouch(ends=True)
    assert worker.told[1:] == [[("b", 0)]], "at its end, what it still has"


def test_a_task_that_goes_on_acks_by_the_new_delivery(worker: Worker) -> None:
    first, second = Channel(), Channel()
    former = message("a", first)
    worker.receive(former)
    request = worker.begin(former).request
    first.connection = None
    worker.adoption.lost()
    worker.receive(message("a", second, tag=7, again=True))
    worker.receive(message("a", second, tag=8, again=True))
    assert [each.delivery_tag for each in worker.to_run] == [1, 8], "a client sent one id twice"
    request._on_ack(None, (ConnectionError,))
    assert (first.acked, second.acked) == ([], [7])


def test_a_suspect_that_goes_on_after_a_lost_connection_is_one_still(worker: Worker) -> None:
    """Its message comes again without the count, and every worker says that it lives after such a loss."""
    hear = worker.consumer.gossip.event_handlers[ROUTING_KEY]
    first = message("a", Channel(), **{DELIVERIES: 1})
    worker.receive(first)
    worker.begin(first)
    first.channel.connection = None
    worker.adoption.lost()
    worker.receive(message("a", Channel(), tag=7, again=True))
    assert worker.adoption.count == 1
    hear({"hostname": "other", "keys": [["b", 0]]})
    assert worker.suspects.bound == 1
    worker.suspects.vouch()
    assert worker.told == [], "it has the message again"
    hear({"hostname": "other", "keys": [["a", 0]]})
    assert worker.suspects.bound == inf


def test_a_task_that_ended_without_a_connection_acks_when_its_message_comes_again(worker: Worker) -> None:
    first, second = Channel(), Channel()
    former = message("a", first)
    worker.receive(former)
    first.connection = None
    worker.end(former)
    worker.receive(message("a", second, tag=7, again=True))
    assert (len(worker.to_run), second.acked) == (1, [7])


@pytest.mark.parametrize("other", [{"retries": 1}, {"id": "b"}, {"id": 5}, {"id": None}])
def test_another_message_is_no_copy(worker: Worker, other: dict[str, Any]) -> None:
    former = message("a", Channel())
    worker.receive(former)
    worker.begin(former)
    worker.adoption.lost()
    worker.receive(message("a", Channel(), again=True, **{COUNT: 1, **other}) if "id" not in other else _renamed(other))
    assert len(worker.to_run) + len(worker.behind.copies) == 2, "it runs, if behind the others"


def _renamed(other: dict[str, Any]) -> kombu.Message:
    renamed = message("a", Channel(), again=True, **{COUNT: 1})
    renamed.headers |= other
    return renamed


def test_a_cancelled_task_runs_again_whatever_becomes_of_it(worker: Worker) -> None:
    former = message("a", Channel())
    worker.receive(former)
    request = worker.begin(former).request
    request._already_cancelled = True
    former.channel.connection = None
    worker.adoption.lost()
    request._on_ack(None, ())
    worker.receive(message("a", Channel(), again=True))
    assert len(worker.to_run) == 2
