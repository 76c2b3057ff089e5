"""Wires to an app's Redis, and the dead letters of one, on a Redis that is in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import kombu.transport.redis
import pytest
from celery import Celery
from needs import missing
from redis.exceptions import ResponseError

from legit_worker.errors import RoutingError
from legit_worker.routing.dead import DeadLetters
from legit_worker.routing.delivery import AwayError, Delivery, NotNowError
from legit_worker.routing.letters import sealed
from legit_worker.routing.wires import RedisWire, Wire, open_wire
from legit_worker.settings import AppSettings, Settings

try:
    import fakeredis
except ImportError:  # the group `test` has it
    fakeredis = None  # type: ignore[assignment]

URL = "redis://localhost:1/0"

#: A time that is long ago, and one that is not.
LONG_AGO, TO_COME = "2020-01-01T00:00:00.000Z", "2120-01-01T00:00:00.000Z"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server to which all of kombu's connections go."""
    if fakeredis is None:
        missing("fakeredis is not installed")
    server = fakeredis.FakeServer()

    class Connection(fakeredis.FakeRedisConnection):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"server": server})

    monkeypatch.setattr(kombu.transport.redis.Channel, "connection_class", Connection)
    return server


@pytest.fixture
def redis(fake: Any) -> Any:
    """What an app or an operator sees of it."""
    return fakeredis.FakeRedis(server=fake)


@pytest.fixture
def app(fake: Any) -> Celery:
    return Celery(broker=URL, set_as_current=False)


@pytest.fixture
def wire(app: Celery) -> Iterator[Wire]:
    opened = open_wire(app, None)
    yield opened
    opened.close()


def envelope(number: int, finished_at: str = TO_COME, app: str = "alpha") -> bytes:
    return json.dumps({"v": 1, "id": f"task-{number}", "app": app, "n": number, "finished_at": finished_at}).encode()


def delivery(number: int, queue: str = "a list", *, is_dead: bool = False, **chosen: Any) -> Delivery:
    return Delivery(
        app="alpha",
        chosen=AppSettings.model_validate(chosen),
        queue=queue,
        task_id=f"task-{number}",
        envelope=envelope(number),
        is_dead_letter=is_dead,
    )


def numbers(redis: Any, key: str = "a list") -> list[int]:
    return [json.loads(raw)["n"] for raw in redis.lrange(key, 0, -1)]


# Wires.


def test_a_group_is_pushed_in_order(wire: Wire, redis: Any) -> None:
    assert isinstance(wire, RedisWire)
    group = [delivery(number) for number in range(5)]
    assert list(wire.send(group)) == [(one, None) for one in group]
    assert numbers(redis) == list(range(5))


def test_laravel_is_told_that_a_job_came(wire: Wire, redis: Any) -> None:
    list(wire.send([delivery(number, format="laravel", job="Ready@handle") for number in range(2)]))
    assert [json.loads(raw)["data"]["n"] for raw in redis.lrange("queues:a list", 0, -1)] == [0, 1]
    assert redis.llen("queues:a list:notify") == 2


def test_what_is_refused_holds_up_no_other_and_nothing_is_sent_twice(wire: Wire, redis: Any) -> None:
    redis.set("no list", "x")
    group = [delivery(1), delivery(2, "no list"), delivery(3)]
    outcomes = dict(wire.send(group))
    assert [type(outcomes[one]) for one in group] == [type(None), ResponseError, type(None)]
    assert numbers(redis) == [1, 3]


def test_a_full_list_takes_what_fits_and_the_rest_later(wire: Wire, redis: Any) -> None:
    group = [delivery(number, queue_max_length=2) for number in range(3)]
    assert [type(error) for _, error in wire.send(group)] == [type(None), type(None), NotNowError]
    redis.lpop("a list")
    assert dict(wire.send(group[2:])) == {group[2]: None}
    assert numbers(redis) == [1, 2]


def test_entries_that_are_too_old_make_room(wire: Wire, redis: Any) -> None:
    redis.rpush("a list", envelope(1, LONG_AGO), envelope(2, LONG_AGO), b"somebody else's", envelope(3, LONG_AGO))
    assert [error for _, error in wire.send([delivery(4, queue_max_seconds=60)])] == [None]
    assert redis.lrange("a list", 0, 0) == [b"somebody else's"], "what is not ours, and what is behind it, stays"
    assert redis.llen("a list") == 3


def test_of_too_many_dead_letters_the_oldest_go(wire: Wire, redis: Any) -> None:
    letters = [delivery(number, "legit.dead.alpha", is_dead=True, dead_max_length=3) for number in range(5)]
    assert [error for _, error in wire.send(letters)] == [None] * 5
    assert numbers(redis, "legit.dead.alpha") == [2, 3, 4]


def test_a_server_that_is_away_is_told_and_found_again(wire: Wire, redis: Any, fake: Any) -> None:
    fake.connected = False
    with pytest.raises(AwayError):
        list(wire.send([delivery(1)]))
    wire.close()
    fake.connected = True
    assert [error for _, error in wire.send([delivery(1)])] == [None]
    assert numbers(redis) == [1]


# Dead letters.


@pytest.fixture
def dead(app: Celery, redis: Any) -> DeadLetters:
    """Two results of an app, one of an app that is not configured any more, and a message of each kind."""
    redis.rpush("legit.dead.alpha", *(sealed(envelope(number), queue=None, reason="it was away") for number in (1, 2)))
    redis.rpush("legit.dead.gone", sealed(envelope(3, app="gone"), queue=None, reason="it was away"))
    redis.rpush("legit.dead", json.dumps(poisoned()))
    redis.rpush("legit.unreadable", b"\xff garbage")
    return DeadLetters(app, Settings.model_validate({"apps": {"alpha": {"queue": "alphas"}}}))


def poisoned() -> dict[str, Any]:
    properties = {"delivery_tag": "a tag", "delivery_info": {"exchange": "", "routing_key": "work"}, "priority": 0}
    message = {"body": "e30=", "headers": {"id": "task-9", "legit_deliveries": 5}, "properties": properties}
    return {"v": 1, "id": "task-9", "queue": "work", "reason": "too often", "deliveries": 5, "message": message}


ALL = {"poisoned": 1, "unreadable": 1, "results of alpha": 2, "results of gone": 1}


def test_letters_are_counted_by_kind_and_app(dead: DeadLetters) -> None:
    assert dead.totals() == ALL
    assert dead.counts() == {"alpha": 2}


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["results"], ["task-1", "task-2", "task-3"]),
        (["alpha"], ["task-1", "task-2"]),
        (["gone"], ["task-3"]),
        (["task-2", "task-9"], ["task-9", "task-2"]),
        (["poisoned", "alpha"], ["task-9", "task-1", "task-2"]),
    ],
)
def test_letters_are_selected_by_kind_app_and_id(dead: DeadLetters, words: list[str], ids: list[str]) -> None:
    assert [letter.id for letter in dead.letters(*words)] == ids


def test_a_word_that_selects_nothing_is_an_error_and_nothing_is_dropped(dead: DeadLetters) -> None:
    with pytest.raises(RoutingError, match="no dead letter has the id, and no app the name, 'task-7'"):
        list(dead.letters("task-7"))
    assert dead.totals() == ALL


def test_what_is_dropped_is_gone_and_the_rest_is_there(dead: DeadLetters) -> None:
    assert dead.drop("task-1", "unreadable").done == 2
    assert dead.totals() == {"poisoned": 1, "results of alpha": 1, "results of gone": 1}


def test_a_misspelt_id_hides_nothing_of_what_was_done(dead: DeadLetters) -> None:
    with pytest.raises(RoutingError, match=r"'task-7'.*The other words select 2, and that is done"):
        dead.drop("alpha", "task-7")
    assert dead.totals() == {name: count for name, count in ALL.items() if name != "results of alpha"}


def test_all_that_can_be_sent_again_is_and_the_rest_is_kept_with_its_reason(dead: DeadLetters, redis: Any) -> None:
    outcome = dead.replay()
    assert outcome.done == 3
    assert dead.totals() == {"unreadable": 1, "results of gone": 1}
    assert "1 kept: no app 'gone' is configured" in outcome.why
    assert "nobody knows its queue: name one with --queue" in outcome.why
    assert [json.loads(raw) for raw in redis.lrange("alphas", 0, -1)] == [json.loads(envelope(one)) for one in (1, 2)]
    (message,) = (json.loads(raw) for raw in redis.lrange("work", 0, -1))
    assert message["headers"] == {"id": "task-9"}, "the next worker counts from none"
    assert message["properties"]["delivery_tag"] != "a tag"


def test_a_message_that_nobody_can_read_goes_where_the_operator_says(dead: DeadLetters, redis: Any) -> None:
    assert dead.replay("unreadable", queue="elsewhere").done == 1
    assert redis.lrange("elsewhere", 0, -1) == [b"\xff garbage"]


def test_a_result_that_its_queue_refuses_stays_a_dead_letter(dead: DeadLetters, redis: Any) -> None:
    redis.set("alphas", "no list")
    outcome = dead.replay("alpha")
    assert outcome.done == 0
    assert "2 kept: ResponseError: WRONGTYPE" in outcome.why
    assert dead.counts() == {"alpha": 2}


def test_of_many_letters_each_is_seen_once_while_some_are_dropped(dead: DeadLetters, redis: Any) -> None:
    redis.delete("legit.dead.alpha")
    redis.rpush(
        "legit.dead.alpha", *(sealed(envelope(one), queue=None, reason="it was away") for one in range(100, 150))
    )
    assert dead.drop(*(f"task-{one}" for one in range(100, 150, 3))).done == 17
    left = [letter.id for letter in dead.letters("alpha")]
    assert left == [f"task-{one}" for one in range(100, 150) if (one - 100) % 3]


def test_a_broker_that_is_away_is_named(dead: DeadLetters, fake: Any) -> None:
    fake.connected = False
    with pytest.raises(RoutingError, match=r"the broker redis://\S*localhost:1/0 does not answer"):
        dead.totals()
