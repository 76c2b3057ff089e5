"""How many tasks a worker holds, and what its broker is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from celery.utils.collections import AttributeDict
from hypothesis import given
from hypothesis import strategies as st
from kombu.common import QoS

from legit_worker.pool import share
from legit_worker.pool.engine import UNKNOWN_SECONDS
from legit_worker.pool.share import MAX_HELD_SECONDS, Prefetch, Share

#: Wide enough to bound nothing by itself.
WINDOW = 1000


class Device:
    """Work that waits, and what a call adds to it."""

    def __init__(self, waiting: float | None = None, each: float = 0.0) -> None:
        self.waiting = waiting
        self.each = each
        self.calls = 0

    def __call__(self, more: float) -> float | None:
        return None if self.waiting is None else self.waiting + more * self.each


def shared(device: Device, max_seconds: float = 4.0, *, own: float = 0.0, ended: int = 0) -> Share:
    """After so many tasks whose own code took so long, each with one model call."""
    subject = Share(device, calls=lambda: device.calls, max_seconds=max_seconds)
    for _ in range(ended):
        device.calls += 1
        subject.ended(own)
    return subject


def test_while_nothing_is_known_each_task_counts_as_slow() -> None:
    subject = shared(Device())
    assert subject.cold(WINDOW) == subject.most(0, 0, WINDOW) == 4.0 / UNKNOWN_SECONDS
    assert subject.cold(8) == subject.most(0, 0, 8) == 8


def test_as_many_tasks_are_held_as_fit_into_the_seconds() -> None:
    assert shared(Device(waiting=0.0, each=0.1), ended=10).most(0, 0, WINDOW) == 40
    assert shared(Device(waiting=3.0, each=0.1), ended=10).most(30, 0, WINDOW) == 40
    assert shared(Device(waiting=3.0, each=0.1), ended=10).most(30, 5, WINDOW) == 35


def test_a_tasks_own_code_counts() -> None:
    assert shared(Device(), own=0.5, ended=10).most(0, 0, WINDOW) == 8
    assert shared(Device(waiting=0.0, each=0.5), own=0.5, ended=10).most(0, 0, WINDOW) == 4


def test_tasks_that_call_no_model_any_more_are_not_counted_as_if_they_did() -> None:
    device = Device(waiting=0.0, each=1.0)
    subject = shared(device, ended=100)
    assert subject.most(0, 0, WINDOW) == 4
    for _ in range(5000):
        subject.ended(0.0001)
    assert subject.most(0, 0, WINDOW) == WINDOW


def test_with_too_much_work_no_further_task_comes() -> None:
    assert shared(Device(waiting=9.0, each=0.1), ended=10).most(90, 0, WINDOW) < 90


@given(
    waiting=st.floats(0, 100),
    each=st.floats(0, 10),
    held=st.integers(0, 2000),
    window=st.integers(1, 2000),
    own=st.floats(0, 10),
)
def test_it_is_never_more_than_the_window_nor_less_than_one(
    waiting: float, each: float, held: int, window: int, own: float
) -> None:
    subject = shared(Device(waiting, each), own=own, ended=3)
    most = subject.most(held, 0, window)
    assert 1 <= most <= window
    if most > max(1, held):
        assert waiting + (most - held) * (each + own) <= MAX_HELD_SECONDS * 1.0001


# What the broker is told.


class Consumer:
    """Celery's, as far as its prefetch count is concerned."""

    def __init__(self, driver: str = "redis", *, quorum: bool = False, queues: int = 1) -> None:
        self.told: list[int] = []
        #: What was said to the channel.
        self.said: list[Any] = []
        arguments = {"x-queue-type": "quorum"} if quorum else {}
        conf = AttributeDict(worker_detect_quorum_queues=True)
        declared = {"work": SimpleNamespace(queue_arguments=arguments)}
        self.app = SimpleNamespace(amqp=SimpleNamespace(queues=declared), conf=conf)
        self.connection = SimpleNamespace(transport=SimpleNamespace(driver_type=driver))
        tags = {f"queue {number}": f"tag {number}" for number in range(queues)}
        channel = SimpleNamespace(
            callbacks=dict.fromkeys(tags.values()),
            basic_cancel=lambda tag, nowait: self.said.append(tag),
            basic_qos=lambda size, count, is_global: self.said.append((count, is_global)),
        )
        self.task_consumer = SimpleNamespace(
            _active_tags=tags,
            channel=channel,
            queues=[SimpleNamespace(name=name, auto_delete=False) for name in tags],
            consume=lambda: self.said.append("consume"),
        )
        self.task_buckets: dict[str, Any] = {"free": None}
        self.initial_prefetch_count = 1024
        self.prefetch_multiplier = 4
        self.qos: Any = None
        self.eta_task_limit: int | None = None

    def connect(self) -> None:
        limit = () if self.eta_task_limit is None else (self.eta_task_limit,)  # kombu 5.6's
        self.qos = QoS(lambda prefetch_count: self.told.append(prefetch_count), self.initial_prefetch_count, *limit)
        self.qos.update()

    def turn(self) -> None:
        """As the hub does."""
        if self.qos.prev != self.qos.value:
            self.qos.update()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whose time only goes on when a test says so."""
    now = SimpleNamespace(seconds=100.0)
    stop_clock(monkeypatch, now)
    return now


def stop_clock(patch: pytest.MonkeyPatch, now: SimpleNamespace) -> None:
    """Have time go on only as `now` says, and while the worker sleeps."""
    patch.setattr(share, "monotonic", lambda: now.seconds)
    patch.setattr(share, "sleep", lambda seconds: setattr(now, "seconds", now.seconds + seconds))


def test_before_it_connects_the_first_count_is_there() -> None:
    consumer = Consumer()
    prefetch = Prefetch(consumer, 32)
    prefetch.want(40)
    consumer.connect()
    assert consumer.told == [40]
    assert consumer.prefetch_multiplier == 1


def test_what_celery_holds_for_later_stays_on_top() -> None:
    consumer = Consumer()
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    consumer.qos.increment_eventually(5)  # tasks with an ETA
    for count in (100, 7, 50):
        prefetch.want(count)
        consumer.turn()
        assert consumer.told[-1] == count + 5
    consumer.qos.decrement_eventually(5)
    prefetch.want(50)
    consumer.turn()
    assert consumer.told[-1] == 50


def test_a_new_connection_begins_where_the_old_one_was() -> None:
    consumer = Consumer()
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(100)
    consumer.connect()
    prefetch.want(90)
    consumer.turn()
    assert consumer.told == [32, 100, 90]


def test_pool_grow_leaves_the_count_to_the_pool() -> None:
    consumer = Consumer()
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    consumer._update_prefetch_count(10)
    prefetch.want(42)
    consumer.turn()
    assert consumer.told == [32, 42]


def test_a_broker_across_a_network_is_told_of_what_matters(clock: Any) -> None:
    consumer = Consumer("amqp")
    prefetch = Prefetch(consumer, 100)
    consumer.connect()
    for count in (110, 95, 120, 81, 126, 125, 100, 1):
        prefetch.want(count)
        consumer.turn()
    assert consumer.told == [100, 126, 100, 1]


def test_a_bound_is_told_however_near_it_is(clock: Any) -> None:
    """While a suspect waits for it, no task of any app would begin."""
    consumer = Consumer("amqp")
    prefetch = Prefetch(consumer, 6)
    consumer.connect()
    for count, told in ((5, True), (6, False)):
        prefetch.want(count, at_most=True)
        consumer.turn()
        assert prefetch.has_told(count)
        assert (consumer.told[-1] == count) == told


def test_consumers_of_quorum_queues_are_replaced_now_and_then(clock: Any) -> None:
    consumer = Consumer("amqp", quorum=True)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(500)
    assert consumer.said == ["tag 0", (500, False), (500, False), "consume"]
    consumer.turn()
    assert consumer.told == [32], "the hub has nothing to add"
    prefetch.want(10)
    assert len(consumer.said) == 4, "too soon"
    consumer.task_consumer._active_tags["queue 0"] = "tag 1"
    clock.seconds += share.CONSUMER_SECONDS
    prefetch.want(10)
    assert consumer.said[4:] == ["tag 1", (10, False), (10, False), "consume"]
    assert consumer.task_consumer.channel.callbacks == {}


def test_a_queue_that_goes_with_its_last_consumer_keeps_it(clock: Any) -> None:
    """Such as a `Broadcast`: RabbitMQ would answer that there is no such queue, and its messages would be lost."""
    consumer = Consumer("amqp", quorum=True, queues=2)
    consumer.task_consumer.queues[1].auto_delete = True
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(500)
    assert [one for one in consumer.said if one in ("tag 0", "tag 1")] == ["tag 0"]
    assert list(consumer.task_consumer._active_tags) == ["queue 1"]


def test_consumers_are_cancelled_when_what_acks_made_room_for_has_come(clock: Any) -> None:
    """Else it goes back, and a quorum queue counts it as delivered."""
    consumer = Consumer("amqp", quorum=True)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    cancelled: list[float] = []
    consumer.task_consumer.channel.basic_cancel = lambda tag, nowait: cancelled.append(clock.seconds)
    acked_at = clock.seconds
    prefetch.want(500)
    assert cancelled == [acked_at + share.ACK_SECONDS]


def request(consumer: Consumer, *, acknowledged: bool = False) -> Any:
    message = SimpleNamespace(channel=consumer.task_consumer.channel)
    return SimpleNamespace(acknowledged=acknowledged, message=message)


def test_what_replaced_consumers_brought_counts(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each smaller count made a worker hold more: what it had, and as many as it wants."""
    consumer = Consumer("amqp", quorum=True)
    held = [request(consumer, acknowledged=number < 5) for number in range(25)]
    monkeypatch.setattr(share.state, "reserved_requests", held)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(10)
    assert consumer.said == ["tag 0", (10, False)], "20 are more than 10"
    assert prefetch.has_told(10), "nothing comes meanwhile"
    assert prefetch.is_due(), "the next task that ends may be the last one too many"
    del held[15:]
    prefetch.want(10)
    assert consumer.said[2:] == [(10, False), "consume"]
    assert not prefetch.is_due()


def test_what_a_lost_connection_brought_does_not_count(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer, former = Consumer("amqp", quorum=True), Consumer("amqp", quorum=True)
    monkeypatch.setattr(share.state, "reserved_requests", [request(former)] * 100)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(10)
    assert consumer.said[-1] == "consume"


def test_tasks_that_wait_for_celerys_rate_limit_count(clock: Any) -> None:
    consumer = Consumer("amqp", quorum=True)
    consumer.task_buckets["limited"] = SimpleNamespace(contents=[object()] * 100)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(10)
    assert "consume" not in consumer.said


def test_tasks_for_later_take_no_place_of_a_new_consumer(clock: Any) -> None:
    consumer = Consumer("amqp", quorum=True)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(32)
    consumer.qos.increment_eventually(500)
    prefetch.want(100)
    assert consumer.said[-2:] == [(100, False), "consume"]


class QuorumQueue:
    """A queue without end. It fills each consumer up to the count that the channel had as it began."""

    def __init__(self, consumer: Consumer) -> None:
        self.held: list[Any] = []
        self._consumer, self._count, self._active = consumer, consumer.initial_prefetch_count, 0
        tasks, channel = consumer.task_consumer, consumer.task_consumer.channel
        channel.basic_qos, channel.basic_cancel, tasks.consume = self._limit, self._cancel, self._consume
        self._consume()

    def _limit(self, _: int, count: int, __: bool) -> None:
        self._count = count

    def _cancel(self, _: str, nowait: bool) -> None:
        self._active = 0

    def _consume(self) -> None:
        self._consumer.task_consumer._active_tags["queue 0"] = "tag"
        self._active = self._count
        self._room = self._count
        self._fill()

    def _fill(self) -> None:
        new = [request(self._consumer) for _ in range(self._room if self._active else 0)]
        self._room -= len(new)
        self.held += new

    def finish(self, number: int) -> None:
        """The tasks that came first end."""
        former = len(self.held) - (self._active - self._room)
        ended = min(number, len(self.held))
        del self.held[:ended]
        self._room += max(0, ended - former)
        self._fill()


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 200), st.integers(0, 100), st.sampled_from([0.0, 0.02, 1.0, 2.5, 15.0])), max_size=40
    )
)
def test_a_worker_never_holds_more_than_twice_what_it_wants_of_a_quorum_queue(
    steps: list[tuple[int, int, float]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        now = SimpleNamespace(seconds=100.0)
        stop_clock(patch, now)
        consumer = Consumer("amqp", quorum=True)
        prefetch = Prefetch(consumer, 32)
        consumer.connect()
        queue = QuorumQueue(consumer)
        patch.setattr(share.state, "reserved_requests", queue.held)
        for count, ended, seconds in steps:
            now.seconds += seconds
            before = len(queue.held)
            queue.finish(ended)
            prefetch.want(count)
            assert len(queue.held) <= max(before, 2 * prefetch._told)
            assert queue._active or len(queue.held) > prefetch._told, "it has consumers, or more than it wants"


def test_consumers_of_several_quorum_queues_share_the_count(clock: Any) -> None:
    consumer = Consumer("amqp", quorum=True, queues=4)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(100)
    assert consumer.said[-2:] == [(25, False), "consume"]


def test_queues_that_are_called_quorum_on_redis_are_lists_like_others(clock: Any) -> None:
    consumer = Consumer(quorum=True)
    prefetch = Prefetch(consumer, 32)
    consumer.connect()
    prefetch.want(100)
    consumer.turn()
    assert (consumer.told, consumer.said) == ([32, 100], [])


@pytest.mark.skipif(kombu.VERSION < (5, 6), reason="the limit is kombu 5.6's")
def test_a_limit_of_tasks_for_later_bounds_all_that_is_held() -> None:
    consumer = Consumer()
    consumer.eta_task_limit = consumer.app.conf["worker_eta_task_limit"] = 40
    prefetch = Prefetch(consumer, 1024)
    consumer.connect()
    assert consumer.told == [40]
    prefetch.want(20)
    for later, told in ((5, 25), (10, 35), (100, 40), (-100, 35), (-15, 20)):
        (consumer.qos.increment_eventually if later > 0 else consumer.qos.decrement_eventually)(abs(later))
        consumer.turn()
        assert consumer.told[-1] == told
    prefetch.want(60)
    consumer.turn()
    assert consumer.told[-1] == 40


@pytest.mark.parametrize(("driver", "told"), [("redis", 1), ("amqp", 60)])
def test_a_worker_that_must_not_prefetch_holds_one_task_at_a_time(driver: str, told: int, clock: Any) -> None:
    """Celery warns on other brokers that it does not heed the setting."""
    consumer = Consumer(driver)
    consumer.app.conf["worker_disable_prefetch"] = True
    prefetch = Prefetch(consumer, 20)
    consumer.connect()
    assert consumer.told == [1], "nobody knows the broker before"
    prefetch.want(60)
    consumer.turn()
    assert consumer.told[-1] == told
    consumer.qos.increment_eventually()
    consumer.turn()
    assert consumer.told[-1] == told + 1
