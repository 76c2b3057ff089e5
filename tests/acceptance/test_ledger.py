"""Messages that a worker holds while it is killed, restarted, cut off or slow: none is lost, or runs twice in vain.

All on Redis, whose broker knows nothing of workers by itself.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import redis
from harness import SIMULATED, Broker, Sides, StartWorker, Worker, poll

from legit_worker.errors import PoisonedMessageError

#: Seconds within which a dead worker's messages are given to others.
LEASE = 6

#: A model that no test waits for: its tasks stay parked.
ENDLESS = {"LEGIT_WORKER_MODELS__ENDLESS__KIND": "simulated", "LEGIT_WORKER_MODELS__ENDLESS__PATH": "0,0,0,600"}

SETTINGS = {"LEGIT_WORKER_LEASE_SECONDS": str(LEASE), **ENDLESS}


@pytest.fixture
def held(start_worker: StartWorker) -> Sides:
    """Workers on the project `held`."""
    return Sides(start_worker, "held")


@pytest.fixture
def on_broker(broker: Broker) -> Iterator[redis.Redis]:
    """A client that sees what is on the broker."""
    if not broker.url.startswith(("redis", "valkey")):
        pytest.skip("RabbitMQ knows which worker holds what")
    with redis.Redis.from_url(broker.url, decode_responses=True) as client:
        yield client


def runs(*workers: Worker) -> Counter[str]:
    """How often each item's task began."""
    return Counter(re.findall(r"(\S+) begins", "\n".join(worker.log for worker in workers)))


def once(items: list[str]) -> Counter[str]:
    return Counter(items)


def names(count: int, kind: str = "item") -> list[str]:
    return [f"{kind}-{number}" for number in range(count)]


def parked(worker: Worker, items: list[str], alias: str = "endless") -> None:
    """Have a worker take these tasks, and no end of them."""
    for item in items:
        worker.send("parks", item, alias)
    poll(lambda: runs(worker).keys() >= set(items), "the tasks to begin")


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
    (record,) = map(json.loads, on_broker.lrange("legit.dead", 0, -1))
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
