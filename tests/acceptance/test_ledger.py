"""Messages that a worker holds while it is killed, restarted, cut off or slow: none is lost, or runs twice in vain.

All on Redis, whose broker knows nothing of workers by itself.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import celery
import kombu.pools
import pytest
import redis
from harness import LATE, SIMULATED, Broker, Sides, StartWorker, Worker, poll
from ownserver import Server

from legit_worker.broker.lease import BEATS
from legit_worker.errors import PoisonedMessageError

#: Seconds within which a dead worker's messages are given to others.
LEASE = 4

#: A model that no test waits for: its tasks stay parked.
ENDLESS = {"LEGIT_WORKER_MODELS__ENDLESS__KIND": "simulated", "LEGIT_WORKER_MODELS__ENDLESS__PATH": "0,0,0,600"}

OnBroker = Callable[[Broker], redis.Redis]

SETTINGS = {"LEGIT_WORKER_LEASE_SECONDS": str(LEASE), **ENDLESS}


@pytest.fixture
def held(start_worker: StartWorker) -> Sides:
    """Workers on the project `held`."""
    return Sides(start_worker, "held")


@pytest.fixture
def on_broker_of(servers: Any) -> Iterator[OnBroker]:
    """Makes clients that see what is on a broker."""
    with contextlib.ExitStack() as stack:

        def see(broker: Broker) -> redis.Redis:
            if not broker.url.startswith(("redis", "valkey")):
                pytest.skip("RabbitMQ knows which worker holds what")
            return stack.enter_context(redis.Redis.from_url(broker.url, decode_responses=True))

        yield see


@pytest.fixture
def on_broker(broker: Broker, on_broker_of: OnBroker) -> redis.Redis:
    """What is on this test's broker."""
    return on_broker_of(broker)


def runs(*workers: Worker) -> Counter[str]:
    """How often each item's task began."""
    return Counter(re.findall(r"(\S+) begins", "\n".join(worker.log for worker in workers)))


def once(items: list[str]) -> Counter[str]:
    return Counter(items)


def names(count: int, kind: str = "item") -> list[str]:
    return [f"{kind}-{number}" for number in range(count)]


def parked(worker: Worker, items: list[str], *others: Worker) -> None:
    """Have workers take these tasks, and no end of them."""
    for item in items:
        worker.send("parks", item, "endless")
    poll(lambda: runs(worker, *others).keys() >= set(items), "the tasks to begin")


def nothing_left(on_broker: redis.Redis) -> None:
    """The broker has no message any more, and knows of none that is held."""
    left = poll(
        lambda: not on_broker.hlen("unacked") and not on_broker.zcard("unacked_index") and not held_keys(on_broker),
        "the last acks",
    )
    assert left


def held_keys(on_broker: redis.Redis) -> list[str]:
    return list(on_broker.scan_iter("legit.held.*"))


# Workers that die.


def test_a_killed_workers_messages_run_elsewhere_within_the_lease(
    held: Sides, broker: Broker, on_broker: redis.Redis
) -> None:
    items = names(20)
    other = held.worker("modelpool", broker=broker, PROJECT_HOST="elsewhere", **SETTINGS)
    parked(other, items)
    heir = held.worker("modelpool", f"--queues={broker.queue}-idle", broker=broker, **SETTINGS)
    heir.wait_until_it_hears()
    heir.client.control.add_consumer(broker.queue, destination=[heir.name])
    mine = names(5, "mine")
    other.kill()
    parked(heir, mine)
    assert poll(lambda: runs(heir) == once([*items, *mine]), "exactly those", LEASE + 5)
    assert re.search(r"worker \S+ has died: its 20 messages are given back", heir.log)
    assert len(held_keys(on_broker)) == 1
    assert on_broker.zcard("legit.owners") == 1


def test_a_restarted_worker_on_the_same_machine_gets_its_messages_at_once(
    held: Sides, broker: Broker, on_broker: redis.Redis
) -> None:
    items, settings = names(20), ENDLESS | {"LEGIT_WORKER_LEASE_SECONDS": "3600"}
    first = held.worker("modelpool", broker=broker, **settings)
    parked(first, items)
    first.kill()
    second = held.worker("modelpool", broker=broker, **settings)
    poll(lambda: runs(second) == once(items), "exactly those")


def test_a_task_that_kills_its_workers_is_buried_and_takes_nobody_with_it(
    held: Sides, broker: Broker, on_broker: redis.Redis
) -> None:
    client = broker.client()
    killer = client.send_task("dies", ["killer"])
    good = [client.send_task("parks", [item]) for item in names(10)]
    dead = []
    while not (killer.ready() and all(result.ready() for result in good)):
        assert len(dead) <= 5, "a worker started in vain"
        environment = SIMULATED | SETTINGS | {"LEGIT_WORKER_ENABLED": "1", "LEGIT_WORKER_DEVICE": "cpu"}
        worker = held.start("held", broker=broker, wait=False, environment=environment)
        dead.append(worker)
        with contextlib.suppress(AssertionError):  # it has ended
            worker.settle([killer, *good])
    assert len(dead) == 6, "five died, and the sixth buried it"
    assert [result.get(timeout=1) for result in good] == names(10)
    with pytest.raises(PoisonedMessageError, match="delivered 5 times"):
        killer.get(timeout=1)
    assert runs(*dead)["killer"] == 5
    (record,) = map(json.loads, poll(lambda: on_broker.lrange("legit.dead", 0, -1), "the message among the dead"))
    assert record | {"at": 0, "message": 0, "reason": 0} == {
        "v": 1,
        "id": killer.id,
        "task": "dies",
        "queue": broker.queue,
        "exchange": record["exchange"],
        "routing_key": broker.queue,
        "reason": 0,
        "deliveries": 5,
        "at": 0,
        "message": 0,
    }
    assert "delivered 5 times" in record["reason"]
    assert "legit_deliveries" not in json.dumps(record["message"])
    nothing_left(on_broker)


def test_a_record_that_the_server_refuses_ends_no_worker_and_is_not_lost(
    held: Sides, broker: Broker, on_broker: redis.Redis
) -> None:
    on_broker.set("legit.dead", "no list")
    worker = held.worker("modelpool", broker=broker, **SETTINGS)
    poisoned = worker.client.send_task("parks", ["poisoned"], headers={"legit_deliveries": 5})
    with pytest.raises(PoisonedMessageError):
        worker.answer(poisoned)
    worker.wait_for_log("the broker refuses messages or records of them")
    for item in names(20):
        assert worker.ask("parks", item) == item
    poll(lambda: on_broker.hlen("unacked") == on_broker.zcard("unacked_index") == 1, "the other acks")
    on_broker.delete("legit.dead")
    (record,) = map(json.loads, poll(lambda: on_broker.lrange("legit.dead", 0, -1), "the record"))
    assert record["id"] == poisoned.id
    nothing_left(on_broker)


@pytest.mark.parametrize("key", ["legit.owners", "legit.processes", "legit.beat", "legit.unreadable"])
def test_a_key_that_somebody_else_has_written_ends_no_worker(
    held: Sides, broker: Broker, on_broker: redis.Redis, key: str
) -> None:
    """Without it, the worker fetches messages as kombu does."""
    on_broker.hset(key, "somebody", "else")
    on_broker.lpush(broker.queue, "garbage")
    worker = held.worker("modelpool", broker=broker, **SETTINGS)
    for item in names(5):
        assert worker.ask("parks", item) == item
    assert worker.log.count("does not let this worker reserve messages (WRONGTYPE") == (key != "legit.processes")
    nothing_left(on_broker)


# Messages that are held for longer than the visibility timeout.


def test_a_batch_longer_than_the_visibility_timeout_runs_once(
    held: Sides, servers: Any, on_broker_of: OnBroker
) -> None:
    broker = servers.fresh(redelivery_seconds=1)
    slow = SETTINGS | {"LEGIT_WORKER_MODELS__SIM__PATH": "4,0"}
    busy = held.worker("modelpool", broker=broker, **slow)
    sent = [busy.send("parks", item) for item in names(8)]
    poll(lambda: len(runs(busy)) == 8, "the tasks to begin")
    idle = held.worker("modelpool", broker=broker, **slow)
    busy.settle(sent)
    assert runs(busy, idle) == once(names(8))
    nothing_left(on_broker_of(broker))


def test_an_eta_beyond_the_visibility_timeout_runs_once(held: Sides, servers: Any, on_broker_of: OnBroker) -> None:
    broker = servers.fresh(redelivery_seconds=2)
    workers = [held.worker("modelpool", broker=broker, **SETTINGS) for _ in range(2)]
    sent = [workers[0].client.send_task("parks", [item], countdown=6) for item in names(4)]
    workers[0].settle(sent)
    assert runs(*workers) == once(names(4))
    nothing_left(on_broker_of(broker))


# Connections that break.


def test_lost_connections_leave_nothing_unacked(held: Sides, broker: Broker, on_broker: redis.Redis) -> None:
    slow = SETTINGS | {"LEGIT_WORKER_MODELS__SIM__PATH": "0.05,0.001"}
    worker = held.worker("modelpool", broker=broker, **slow)
    sent = [worker.send("parks", item) for item in names(400)]
    for number in range(10):
        poll(lambda done=number * 30: worker.log.count(" succeeded in ") > done, "tasks to end")
        on_broker.client_kill_filter(_type="normal", skipme=True)
    worker.settle(sent)
    assert worker.stop() == 0
    nothing_left(on_broker)
    assert on_broker.zcard("legit.owners") == 0
    assert set(runs(worker).values()) == {1}, "none that had begun began again"


def test_a_server_that_is_killed_while_tasks_are_parked_hears_of_their_ends(
    held: Sides, server: Server, on_broker_of: OnBroker
) -> None:
    broker = Broker(url=server.url, backend=server.url, queue="work")
    worker = held.worker("modelpool", broker=broker, PROJECT_RETRY_RESULTS="1", **SETTINGS, **LATE)
    sent = [worker.send("parks", item, "late") for item in names(20)]
    poll(lambda: len(runs(worker)) == 20, "the tasks to begin")
    server.kill()
    server.start()
    kombu.pools.reset()
    worker.renew_client()
    worker.settle([worker.client.AsyncResult(result.id) for result in sent])
    assert runs(worker) == once(names(20))
    nothing_left(on_broker_of(broker))


# Other workers on the same queues.


@pytest.mark.skipif(celery.__version__ < "5.7", reason="stock looks for old messages every 100 seconds before that")
def test_stock_workers_take_over_and_are_taken_over(held: Sides, servers: Any, on_broker_of: OnBroker) -> None:
    """After the visibility timeout, as among themselves."""
    broker = servers.fresh(redelivery_seconds=3)
    on_broker = on_broker_of(broker)
    ours = held.worker("modelpool", broker=broker, **SETTINGS)
    parked(ours, names(10))
    ours.kill()
    stock = held.worker("stock", "--prefetch-multiplier=20", broker=broker, PROJECT_ACKS_LATE="1", **SETTINGS)
    poll(lambda: runs(stock), "a stock worker to take a task over")
    stock.kill()
    heir = held.worker("modelpool", broker=broker, **SETTINGS)
    poll(lambda: runs(heir) == once(names(10)), "ours to take them over")
    assert on_broker.hlen("unacked") == 10


@pytest.mark.parametrize(("before", "after"), [("stock", "modelpool"), ("modelpool", "stock")])
def test_a_rolling_change_runs_each_task_once(
    held: Sides, broker: Broker, on_broker: redis.Redis, before: str, after: str
) -> None:
    """Both take from one queue for a while, and then the former one ends in peace. Some tasks wait for their time."""
    former = held.worker(before, broker=broker, PROJECT_ACKS_LATE="1", **SETTINGS)
    idle = f"--queues={broker.queue}-idle"
    latter = held.worker(after, idle, broker=broker, PROJECT_ACKS_LATE="1", **SETTINGS)
    latter.wait_until_it_hears()
    sent = [former.client.send_task("parks", [item], countdown=8) for item in names(4, "later")]
    sent += [former.send("parks", item) for item in names(20)]
    poll(lambda: runs(former), "the former one to begin")
    latter.client.control.add_consumer(broker.queue, destination=[latter.name], reply=True)
    both: list[Any] = []

    def the_latter_has_one() -> bool:  # a stock worker hears of a new queue at its next look
        both.append(former.send("parks", f"both-{len(both)}"))
        return bool(runs(latter))

    poll(the_latter_has_one, "the latter one to begin")
    sent += both
    assert former.stop() == 0
    sent += [latter.send("parks", item) for item in names(20, "after")]
    latter.settle(sent)
    assert runs(former, latter) == once(names(4, "later") + names(20) + names(len(both), "both") + names(20, "after"))
    nothing_left(on_broker)


# What is no message.


@pytest.mark.parametrize("side", ["stock", "modelpool"])
def test_garbage_and_a_kill_stop_no_worker_from_starting(
    held: Sides, servers: Any, on_broker_of: OnBroker, side: str
) -> None:
    broker = servers.fresh(redelivery_seconds=1)
    on_broker = on_broker_of(broker)
    worker = held.worker("modelpool", broker=broker, **SETTINGS)
    seen = []
    with on_broker.monitor() as monitor:
        on_broker.lpush(broker.queue, "garbage")
        for command in monitor.listen():
            seen.append(command["command"])
            if "legit.unreadable" in seen[-1] and "RPUSH" in seen[-1]:
                break
    worker.kill()
    assert not [command for command in seen if "unacked" in command and "garbage" in command]
    assert on_broker.lrange("legit.unreadable", 0, -1) == ["garbage"]
    heir = held.worker(side, broker=broker, **SETTINGS)
    assert heir.ask("parks", "after") == "after"


def test_what_an_older_release_noted_of_garbage_is_put_aside(held: Sides, servers: Any, on_broker_of: OnBroker) -> None:
    broker = servers.fresh(redelivery_seconds=1)
    on_broker = on_broker_of(broker)
    on_broker.hset("unacked", "a tag", '[garbage, "", "celery"]')
    on_broker.zadd("unacked_index", {"a tag": 1})
    worker = held.worker("modelpool", broker=broker, **SETTINGS)
    assert worker.ask("parks", "after") == "after"
    poll(lambda: on_broker.lrange("legit.unreadable", 0, -1) == ["garbage"], "it to be put aside")
    nothing_left(on_broker)


# Workers that are slow, and servers that are away, for longer than a lease.


def test_a_worker_that_sleeps_for_longer_than_its_lease_is_taken_for_dead_and_goes_on(
    held: Sides, broker: Broker, on_broker: redis.Redis
) -> None:
    sleeper = held.worker("modelpool", broker=broker, PROJECT_HOST="elsewhere", **SETTINGS)
    parked(sleeper, names(5))
    heir = held.worker("modelpool", broker=broker, **SETTINGS)
    sleeper.signal(signal.SIGSTOP)
    poll(lambda: runs(heir) == once(names(5)), "the other to take over")
    sleeper.signal(signal.SIGCONT)
    sleeper.wait_for_log("the broker heard no sign of life of this worker")
    heir.kill()
    poll(lambda: sum(runs(sleeper).values()) > 5 or on_broker.zcard("legit.owners") == 1, "the dead one to be found")
    sleeper.ask("no_model", 1)


def test_a_worker_that_wakes_after_its_lease_begins_nothing_that_others_have(
    held: Sides, broker: Broker, on_broker: redis.Redis
) -> None:
    """Tasks that wait for their time, which comes while the worker sleeps."""
    sleeper = held.worker("modelpool", broker=broker, PROJECT_HOST="elsewhere", **SETTINGS)
    heir = held.worker("modelpool", broker=broker, **SETTINGS)
    heir.signal(signal.SIGSTOP)
    sent = [sleeper.client.send_task("parks", [item], countdown=LEASE / 2) for item in names(5)]
    later = [sleeper.client.send_task("parks", [item], countdown=3 * LEASE) for item in names(2, "later")]
    poll(lambda: on_broker.hlen("unacked") == 7, "the sleeper to hold them")
    sleeper.signal(signal.SIGSTOP)
    heir.signal(signal.SIGCONT)
    heir.settle(sent)
    sleeper.signal(signal.SIGCONT)
    sleeper.wait_for_log("7 of its messages are others' by now")
    heir.settle(later)
    assert runs(heir) == once(names(5) + names(2, "later"))
    assert runs(sleeper) == {}
    heir.stop()
    assert sleeper.ask("parks", "another") == "another", "it goes on"
    nothing_left(on_broker)


def test_a_server_that_is_away_for_longer_than_a_lease_kills_nobody(
    held: Sides, server: Server, on_broker_of: OnBroker
) -> None:
    broker = Broker(url=server.url, backend=server.url, queue="work")
    workers = [held.worker("modelpool", broker=broker, **SETTINGS) for _ in range(2)]
    parked(workers[0], names(40), workers[1])
    held_before = {worker.name: runs(worker) for worker in workers}
    server.freeze()
    time.sleep(LEASE + 1)
    server.thaw()
    on_broker = on_broker_of(broker)
    for _ in range(2 * BEATS):
        beat = on_broker.get("legit.beat")
        poll(lambda before=beat: on_broker.get("legit.beat") != before, "a beat")
    assert {worker.name: runs(worker) for worker in workers} == held_before
    assert all("has died" not in worker.log for worker in workers)
