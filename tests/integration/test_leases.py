"""Who counts as dead, and what happens to the messages of the dead, on a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import redis
from harness import poll

from legit_worker.broker import lease
from legit_worker.broker.lease import BEATS, Lease, is_gone, this_process
from legit_worker.broker.ledger import Ledger, Worker
from legit_worker.broker.reserve import COMPANY, LITTLE_COMPANY, MORE, NO_ROOM, RESERVE, Source, company
from legit_worker.broker.returning import DELIVERIES, GROUP, Keys, redelivered
from legit_worker.broker.scripts import Script

KEYS = Keys(unacked="unacked", index="unacked_index")

LEASE = 1.2

MOST = 5


@pytest.fixture
def server(servers: Any) -> Iterator[redis.Redis]:
    """A server with nothing in it."""
    with redis.Redis.from_url(servers.embedded) as client:
        client.flushall()
        yield client


@dataclass
class Member:
    """A worker's ledger and lease, whose thread does not run."""

    server: redis.Redis
    node: str = "one"
    #: What others can see of its process; None is this process.
    process: dict[str, Any] | None = None
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(KEYS, Worker(node=self.node, lease_seconds=LEASE, max_deliveries=MOST))
        self.lease = Lease(self.ledger, self.server, 3600.0)
        self.beat()

    def beat(self) -> dict[str, Any]:
        """Who is dead by now."""
        dead = self.lease.beat()
        if self.process is not None:
            self.server.hset(KEYS.processes, self.ledger.owner, json.dumps(self.process))
        return dead

    def reserve(self, most: int = 100, held: int = 0, bound: int = 0) -> list[Any]:
        """What the script says, and the ids of the messages that it hands over."""
        keys = [KEYS.unacked, KEYS.index, KEYS.unreadable, KEYS.held(self.ledger.owner), "work"]
        asked = [most, 1 << 20, repr(time.time()), "new-tag", 1, "", 1, MOST, held, bound, 0, "work", 1]
        state, suspect, *found = Script(RESERVE).run(self.server, keys, *asked)
        for tag in found[1::3]:
            self.ledger.hold(tag.decode(), Source("work", "work", True))
        return [state, suspect, *(json.loads(raw)["headers"]["id"] for raw in found[2::3])]

    def lose_server(self) -> None:
        """As if nobody listened at the server's address any more."""
        self.lease._client = redis.Redis(port=1)

    def die(self) -> None:
        """As a while after a kill, on another machine."""
        now = time.time()
        self.server.zadd(KEYS.owners, {self.ledger.owner: now - 1})
        self.server.set(KEYS.beat, f"{now} {now - 1}")


def put(server: redis.Redis, *ids: str, deliveries: int = 0) -> None:
    for identity in ids:
        headers = {"id": identity} | ({DELIVERIES: deliveries} if deliveries else {})
        to = {"exchange": "", "routing_key": "work"}
        properties = {"delivery_tag": f"tag of {identity}", "delivery_info": to}
        server.lpush("work", json.dumps({"body": "[]", "headers": headers, "properties": properties}))


def waiting(server: redis.Redis) -> dict[str, int]:
    """The messages in the list, the next one first, with the deaths that they have seen."""
    headers = [json.loads(raw)["headers"] for raw in reversed(server.lrange("work", 0, -1))]
    return {one["id"]: one.get(DELIVERIES, 0) for one in headers}


# Who is dead.


def test_this_process_lives_and_one_that_ended_does_not() -> None:
    assert not is_gone(this_process())
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert is_gone(this_process() | {"pid": int(ended.stdout)})
    assert is_gone(this_process() | {"started": "1"}), "another process has its number by now"


def test_a_process_that_is_hidden_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hidepid` on /proc, and a worker of another user."""

    def hide(*_: Any) -> None:
        raise FileNotFoundError("hidden")

    def refuse(*_: Any) -> None:
        raise PermissionError("another user's")

    this = this_process()
    monkeypatch.setattr(lease, "_started", hide)
    assert not is_gone(this)
    monkeypatch.setattr(lease.os, "kill", refuse)
    assert not is_gone(this)


@pytest.mark.parametrize("part", ["host", "boot", "namespace"])
def test_nothing_is_known_of_a_process_of_another_machine(part: str) -> None:
    assert not is_gone(this_process() | {part: "another", "pid": os.getpid() + 100_000})


def test_nothing_is_known_of_a_process_that_says_nothing() -> None:
    assert not is_gone({})


def test_a_worker_without_a_sign_of_life_is_dead_within_its_lease(server: redis.Redis) -> None:
    silent, other = Member(server, process={}), Member(server, "other", process={})
    began = time.monotonic()
    while not (dead := other.beat()):
        assert time.monotonic() - began < LEASE
        time.sleep(LEASE / BEATS / 4)
    assert dead.keys() == {silent.ledger.owner}


def test_nobody_is_dead_because_the_server_was_away(server: redis.Redis) -> None:
    """All leases have ended meanwhile, and nobody had a chance to renew his."""
    one, other = Member(server, process={}), Member(server, "other", process={})
    time.sleep(LEASE)
    assert one.beat() == {}
    assert other.beat() == {}
    assert one.beat() == {}


def test_a_worker_that_was_taken_for_dead_says_so_and_hides_its_process(
    server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    member = Member(server)
    assert b'"pid"' in server.hget(KEYS.processes, member.ledger.owner)
    member.die()
    member.beat()
    assert "the broker heard no sign of life of this worker" in caplog.text
    member.beat()
    assert caplog.text.count("no sign of life") == 1
    assert b'"pid"' not in server.hget(KEYS.processes, member.ledger.owner)


def test_a_worker_that_was_taken_for_dead_forgets_what_others_took_and_nothing_else(server: redis.Redis) -> None:
    sleeper, heir = Member(server, process={}), Member(server, "heir", process={})
    put(server, "a", "b")
    sleeper.reserve()
    sleeper.ledger.hold("fetched by kombu")
    sleeper.die()
    for owner, process in heir.beat().items():
        heir.lease._recover(owner, process)
    put(server, "new")
    assert sleeper.reserve(most=1)[2:] == ["a"], "which it gets again, with the same tag"
    sleeper.beat()
    assert sleeper.ledger.is_in_doubt
    sleeper.ledger.give_back("tag of b")
    sleeper.ledger.forget_lapsed(server)
    assert not sleeper.ledger.is_in_doubt
    assert sleeper.ledger.held.keys() == {"tag of a", "fetched by kombu"}
    assert sleeper.ledger.is_settled, "what is others' is not given back"


def test_a_worker_is_in_doubt_as_soon_as_its_lease_is_over(server: redis.Redis) -> None:
    """Its main thread may wake before the one that beats."""
    member = Member(server)
    assert not member.ledger.is_in_doubt
    poll(lambda: member.ledger.is_in_doubt, "the lease to be over")
    member.beat()
    member.ledger.forget_lapsed(server)
    assert not member.ledger.is_in_doubt


# What the dead leave.


def test_what_a_dead_worker_held_goes_behind_the_others_and_counts_its_death(server: redis.Redis) -> None:
    dead = Member(server, process={})
    put(server, "a", "b", "c")
    put(server, "d", deliveries=2)
    assert dead.reserve()[2:] == ["a", "b", "c", "d"]
    put(server, "new")
    dead.die()
    heir = Member(server, "heir", process={})
    for owner, process in heir.beat().items():
        heir.lease._recover(owner, process)
    assert waiting(server) == {"new": 0, "a": 1, "b": 1, "c": 1, "d": 3}
    assert list(waiting(server)) == ["new", "a", "b", "c", "d"]
    assert server.hlen("unacked") == server.zcard("unacked_index") == 0
    assert server.zrange(KEYS.owners, 0, -1) == [heir.ledger.owner.encode()]
    assert server.hkeys(KEYS.processes) == [heir.ledger.owner.encode()]


def test_a_task_that_waited_for_its_time_saw_no_death() -> None:
    """It can't have been the one that killed the worker."""
    soon = (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()
    assert DELIVERIES not in redelivered({"headers": {"eta": soon}}, died=True)["headers"]
    past = {"headers": {"eta": "2001-01-01T00:00:00Z", DELIVERIES: 1}}
    assert redelivered(past, died=True)["headers"][DELIVERIES] == 2


def test_what_somebody_else_took_over_meanwhile_stays_his(server: redis.Redis) -> None:
    """By the visibility timeout, which stock workers look at, too. The tag stays."""
    dead = Member(server, process={})
    put(server, "a", "b")
    dead.reserve()
    server.zadd("unacked_index", {"tag of a": time.time()})
    dead.die()
    heir = Member(server, "heir", process={})
    for owner, process in heir.beat().items():
        heir.lease._recover(owner, process)
    assert waiting(server) == {"b": 1}
    assert server.hkeys("unacked") == [b"tag of a"]


def test_a_renewed_message_is_still_its_owners(server: redis.Redis) -> None:
    dead = Member(server, process=None)
    put(server, "a")
    dead.reserve()
    before = server.zscore("unacked_index", "tag of a")
    dead.lease._renewed_at = float("-inf")
    dead.lease.work()
    assert server.zscore("unacked_index", "tag of a") > before
    told = json.loads(server.hget(KEYS.processes, dead.ledger.owner))
    server.hset(KEYS.processes, dead.ledger.owner, json.dumps(told | {"started": "1"}))
    Member(server, "heir").lease.work()
    assert waiting(server) == {"a": 1}


def test_what_is_anothers_by_now_is_not_renewed(server: redis.Redis) -> None:
    """This worker was taken for dead, and its other thread has not looked yet."""
    sleeper, heir = Member(server, process={}), Member(server, "heir", process={})
    put(server, "a")
    sleeper.reserve()
    sleeper.ledger.hold("fetched by kombu")
    server.zadd("unacked_index", {"fetched by kombu": 1})
    sleeper.die()
    for owner, process in heir.beat().items():
        heir.lease._recover(owner, process)
    assert heir.reserve()[2:] == ["a"]
    taken_at = server.zscore("unacked_index", "tag of a")
    sleeper.lease._renewed_at = float("-inf")
    sleeper.lease.work()
    assert server.zscore("unacked_index", "tag of a") == taken_at
    assert server.zscore("unacked_index", "fetched by kombu") > 1


def test_messages_whose_answer_is_not_read_yet_are_renewed(server: redis.Redis) -> None:
    """The main thread may hold them up for longer than the visibility timeout."""
    member = Member(server)
    put(server, "a")
    member.reserve()
    member.ledger.forget("tag of a")
    before = server.zscore("unacked_index", "tag of a")
    member.lease._renewed_at = float("-inf")
    member.lease.work()
    assert server.zscore("unacked_index", "tag of a") > before


def test_a_renewal_that_failed_is_made_up_for_with_the_next_beat(server: redis.Redis) -> None:
    member = Member(server)
    put(server, "a")
    member.reserve()
    before = server.zscore("unacked_index", "tag of a")
    member.lease._renewed_at = float("-inf")
    member.lease._client = redis.Redis(port=1)
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            member.lease.work()
    member.lease._client = server
    member.lease.work()
    assert server.zscore("unacked_index", "tag of a") > before
    renewals = json.loads(server.hget(KEYS.processes, member.ledger.owner))["renewals"]
    assert len(renewals) == 3, "others know each time that the messages may have"
    assert member.lease._renewals == renewals[:1]


def test_a_message_that_can_not_go_back_stays_noted(server: redis.Redis) -> None:
    member = Member(server)
    put(server, "a")
    member.reserve()
    server.set("work", "no list")
    member.ledger.give_back("tag of a")
    with pytest.raises(redis.ResponseError):
        member.ledger.flush(server)
    assert server.hkeys("unacked") == [b"tag of a"]
    server.delete("work")
    member.ledger.flush(server)
    assert waiting(server) == {"a": 0}


@pytest.mark.parametrize("trouble", ["its list is no list", "its notes are unreadable"])
def test_a_dead_worker_whose_messages_can_not_go_back_keeps_no_other_from_that(
    server: redis.Redis, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    first, second = Member(server, "1", process={}), Member(server, "2", process={})
    put(server, "a", *map(str, range(GROUP)), "b")
    first.reserve(GROUP + 1)
    second.reserve()
    held = KEYS.held(first.ledger.owner)
    server.set("another", "no list")
    noted = server.hget(held, "tag of a").decode()
    server.hset(held, "tag of a", noted.replace("work", "another") if "list" in trouble else "garbage")
    for member in (first, second):
        member.die()
    server.zadd(KEYS.owners, {first.ledger.owner: 1})
    heir = Member(server, "heir", process={})
    for _ in range(2):
        server.set(KEYS.beat, f"{time.time()} {time.time() - 1}")
        heir.lease.work()
    assert "b" in waiting(server)
    assert caplog.text.count("not all messages of worker 1, which has died, can be given back") == 1
    assert server.hexists("unacked", "tag of a")
    if "list" in trouble:
        assert waiting(server).keys() == {*map(str, range(GROUP)), "b"}
        assert server.hkeys(held) == [b"tag of a"]


def test_what_comes_from_its_list_again_is_not_given_back_again(server: redis.Redis) -> None:
    """It went back beside a message that the server refused, so the worker does not know."""
    member = Member(server)
    put(server, "a")
    member.reserve()
    for _ in range(2):  # the second time, the message is noted as the first time
        member.ledger.give_back("tag of a")
        member.ledger.flush(server)
        member.ledger.outbox.give_back("tag of a", "work")
        assert member.reserve()[2:] == ["a"]
    assert member.ledger.is_settled
    assert waiting(server) == {}


def test_what_was_given_back_and_taken_by_another_is_not_given_back_again(server: redis.Redis) -> None:
    """The answer was lost, and the other's note is the same as this worker's was."""
    one, other = Member(server), Member(server, "other")
    put(server, "a")
    one.reserve()
    one.ledger.give_back("tag of a")
    one.ledger.flush(server)
    one.reserve()
    one.ledger.give_back("tag of a")
    one.ledger.flush(server)
    assert other.reserve()[2:] == ["a"]
    one.ledger.outbox.give_back("tag of a", "work")
    one.ledger.flush(server)
    assert one.ledger.is_settled
    assert waiting(server) == {}
    assert server.hkeys("unacked") == [b"tag of a"]


def test_a_worker_that_ends_leaves_nothing_and_counts_no_death(server: redis.Redis) -> None:
    member = Member(server)
    put(server, "a", "b", "c")
    member.reserve()
    member.ledger.ack("tag of b")
    member.lease.leave()
    assert waiting(server) == {"a": 0, "c": 0}
    assert not list(server.scan_iter("legit.held.*"))
    assert server.zcard(KEYS.owners) == server.hlen(KEYS.processes) == server.hlen("unacked") == 0


@pytest.mark.parametrize("acked", [0, 2, 3])
def test_a_worker_that_ends_without_its_server_tells_how_many_tasks_run_again(
    server: redis.Redis, caplog: pytest.LogCaptureFixture, acked: int
) -> None:
    member = Member(server)
    put(server, "a", "b", "c")
    member.reserve()
    for tag in list(member.ledger.held)[:acked]:
        member.ledger.ack(tag)
    member.lose_server()
    member.lease.leave()
    (line,) = caplog.messages
    assert "its 3 messages are given back" in line
    assert f"the tasks of {acked} of them are done, and run again" in line


def test_a_worker_that_ends_with_nothing_and_without_its_server_says_nothing(
    server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    member = Member(server)
    member.lose_server()
    member.lease.leave()
    assert not caplog.messages


# Suspects.


@pytest.mark.parametrize(
    ("deliveries", "room"), [(1, COMPANY), (2, COMPANY), (3, LITTLE_COMPANY), (4, 1), (5, 1), (9, 1)]
)
def test_the_more_deaths_a_message_has_seen_the_fewer_run_beside_it(
    server: redis.Redis, deliveries: int, room: int
) -> None:
    assert company(deliveries, MOST) == room
    member = Member(server)
    put(server, *map(str, range(40)), deliveries=deliveries)
    state, suspect, *got = member.reserve()
    assert (state, suspect, len(got)) == (NO_ROOM, room, room)


def test_a_worker_that_holds_others_leaves_a_suspect_where_it_is(server: redis.Redis) -> None:
    member = Member(server)
    put(server, "good")
    put(server, "suspect", deliveries=4)
    put(server, "behind")
    assert member.reserve() == [NO_ROOM, 1, "good"]
    assert member.reserve(held=1) == [NO_ROOM, 1]
    assert member.reserve() == [NO_ROOM, 0, "suspect"], "and nothing beside it"
    assert member.reserve(held=1, bound=1) == [NO_ROOM, 0]
    assert member.reserve() == [0, 0, "behind"]


def test_without_suspects_a_worker_takes_what_it_may(server: redis.Redis) -> None:
    member = Member(server)
    put(server, *map(str, range(100)))
    state, _, *got = member.reserve(most=64)
    assert (state, len(got)) == (MORE, 64)


def test_a_suspect_that_starts_later_bounds_nothing_until_then() -> None:
    ledger = Ledger(KEYS, Worker(node="one", lease_seconds=LEASE, max_deliveries=MOST))
    ledger.hold("now")
    ledger.hold("later")
    ledger.special.add("later", 4, "2999-01-01T00:00:00Z")
    assert (ledger.awake, ledger.bound) == (1, 0)
    ledger.special.add("now", 3, None)
    assert (ledger.awake, ledger.bound) == (1, LITTLE_COMPANY)
    ledger.ack("now")
    assert (ledger.awake, ledger.bound) == (0, 0)


def test_a_suspect_whose_result_is_on_its_way_counts_and_others_do_not() -> None:
    """Its own code is over, but the next task could still cost it its last delivery."""
    worker = Worker(node="one", lease_seconds=LEASE, max_deliveries=MOST, harmless=lambda: {"good", "suspect", "acked"})
    ledger = Ledger(KEYS, worker)
    for tag in ("good", "suspect", "acked"):
        ledger.hold(tag)
    ledger.special.add("suspect", 4, None)
    ledger.ack("acked")
    assert (ledger.awake, ledger.bound) == (1, 1)
