"""When to fetch and when to compute, without a hub or a broker."""

from __future__ import annotations

import fcntl
import resource
import socket

import pytest

from legit_worker.pool import pace as pace_module
from legit_worker.pool import wakeup
from legit_worker.pool.pace import Pace
from legit_worker.pool.wakeup import Wakeup


class Listener:
    """Stands for the hub's poller: notes how long it was asked to listen, and says whether anything came."""

    def __init__(self, *, hears: bool = False) -> None:
        self.hears = hears
        self.asked: list[float] = []

    def __call__(self, seconds: float) -> bool:
        self.asked.append(seconds)
        return self.hears


def ask(
    pace: Pace,
    listener: Listener,
    *,
    waiting_seconds: float = 1.0,
    surplus_seconds: float = 0.0,
    launch_seconds: float = 0.0,
    full: bool = False,
    coming: bool | None = None,
) -> bool:
    return pace.should_compute(
        waiting_seconds=waiting_seconds,
        surplus_seconds=surplus_seconds,
        launch_seconds=launch_seconds,
        full=lambda: full,
        coming=coming,
        look=listener,
    )


def test_a_lone_task_is_computed_after_one_glance() -> None:
    pace, listener = Pace(None), Listener()
    pace.task_arrived()
    assert not ask(pace, listener)
    assert ask(pace, listener)
    assert listener.asked == [pace_module.GLANCE]


def test_a_lone_task_is_computed_at_once_if_the_broker_has_no_more() -> None:
    pace, listener = Pace(None), Listener()
    pace.task_arrived()
    assert ask(pace, listener, coming=False)
    assert listener.asked == [0.0]


def test_a_lone_task_waits_no_longer_than_a_glance_for_the_brokers_answer() -> None:
    pace, listener = Pace(None), Listener()
    for _ in range(3):
        pace.task_arrived()
        assert not ask(pace, listener, coming=True)
        assert ask(pace, listener, coming=True)
        pace.batch_done()
    assert listener.asked == [pace_module.GLANCE] * 3


def test_tasks_that_did_not_come_singly_wait_for_the_brokers_answer() -> None:
    pace, listener = Pace(None), Listener()
    pace.task_arrived()
    pace.task_arrived()
    assert not ask(pace, listener, coming=True)
    assert ask(pace, listener, coming=True)
    pace.batch_done()
    pace.batch_done()  # it was handed over, and then collected
    pace.task_arrived()
    assert not ask(pace, listener, coming=True)
    assert ask(pace, listener, coming=True), "the first one after such a batch"
    pace.batch_done()
    pace.task_arrived()
    assert not ask(pace, listener, coming=True)
    assert ask(pace, listener, coming=True)
    assert listener.asked == [pace_module.LOOK, pace_module.LOOK, pace_module.GLANCE]


def test_an_answer_is_waited_for_no_longer_than_the_work_takes_that_is_here() -> None:
    pace, listener = Pace(None), Listener()
    pace.task_arrived()
    pace.task_arrived()
    assert not ask(pace, listener, waiting_seconds=0.005, coming=True)
    assert ask(pace, listener, waiting_seconds=0.005, coming=True)
    assert listener.asked == [0.005]


@pytest.mark.parametrize("delay", [None, 10.0], ids=["by itself", "as long as the user allows"])
def test_a_wait_for_company_takes_a_part_of_the_target_latency(
    delay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(pace_module, "monotonic", lambda: now)
    pace, listener = Pace(delay, target_latency=0.3), Listener(hears=True)
    pace.task_arrived()
    while not ask(pace, listener, launch_seconds=1.0):
        pace.task_arrived()
        now += 0.01
    assert now - 100.0 == pytest.approx(0.1, abs=0.02)


def test_while_tasks_come_it_fetches() -> None:
    pace, listener = Pace(None), Listener(hears=True)
    for _ in range(50):
        pace.task_arrived()
        assert not ask(pace, listener)
        assert not ask(pace, listener)


def test_a_client_that_sends_when_it_has_its_answer_seldom_waits_for_company_that_never_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(pace_module, "monotonic", lambda: now)
    pace, listener = Pace(None), Listener()
    for _ in range(1000):
        pace.batch_done()
        now += 0.001
        pace.task_arrived()
        assert not ask(pace, listener)
        assert ask(pace, listener)
    assert listener.asked[0] == pace_module.LOOK, "nobody knows yet"
    assert 1000 / pace_module.MOST_SKIPPED / 2 < listener.asked.count(pace_module.LOOK) < 30


def test_a_look_that_pays_is_made_again_after_each_batch() -> None:
    pace, listeners = Pace(None), [Listener(), Listener(hears=True)]
    for listener in listeners:
        for _ in range(20):
            pace.batch_done()
            pace.task_arrived()
            ask(pace, listener)
            ask(pace, listener)
    in_vain, paying = (one.asked.count(pace_module.LOOK) for one in listeners)
    assert in_vain < 6
    assert paying > 1


def test_fetching_takes_no_longer_than_computing_what_was_fetched() -> None:
    pace, listener = Pace(None), Listener(hears=True)
    pace.task_arrived()
    ask(pace, listener)
    assert ask(pace, listener, waiting_seconds=0.0)


def test_where_launches_are_dear_and_tasks_stand_waiting_it_goes_on_fetching() -> None:
    pace, listener = Pace(None), Listener(hears=True)
    dear = {"waiting_seconds": 0.0, "launch_seconds": 0.02}
    pace.task_arrived()
    assert not ask(pace, listener), "the first of a burst"
    assert ask(pace, listener, **dear), "whether more stand waiting is not known"
    pace.batch_done()
    pace.task_arrived()
    assert not ask(pace, listener, **dear)
    listener.asked.clear()
    assert not ask(pace, listener, **dear)
    assert listener.asked == [pace_module.GLANCE]
    listener.hears = False
    assert ask(pace, listener, **dear), "nothing more came at once"
    pace.task_arrived()
    assert ask(pace, listener, waiting_seconds=0.0)


def test_a_full_batch_does_not_wait_for_more() -> None:
    pace, listener = Pace(None), Listener(hears=True)
    pace.batch_done()
    pace.task_arrived()
    assert not ask(pace, listener, waiting_seconds=0.001)
    assert ask(pace, listener, waiting_seconds=0.0, launch_seconds=0.02, full=True)


def test_with_plenty_of_work_waiting_it_leaves_the_rest_to_other_workers() -> None:
    pace, listener = Pace(None), Listener(hears=True)
    pace.task_arrived()
    assert ask(pace, listener, surplus_seconds=pace_module.ENOUGH_SECONDS * 1.01)
    assert listener.asked == []


def test_a_launch_of_many_seconds_is_no_reason_to_leave_tasks_to_others() -> None:
    """All that waits is one batch, which takes as long for more."""
    pace, listener = Pace(None), Listener(hears=True)
    for _ in range(50):
        pace.task_arrived()
        assert not ask(pace, listener, waiting_seconds=pace_module.ENOUGH_SECONDS * 10)


@pytest.mark.parametrize(
    ("launch", "patience"),
    [(0.0, pace_module.GLANCE), (0.02, pace_module.GLANCE), (0.2, 0.01), (2.5, pace_module.MAX_LOOK)],
)
def test_a_task_listens_for_company_for_a_small_part_of_a_slow_launch(launch: float, patience: float) -> None:
    pace, listener = Pace(None), Listener()
    pace.task_arrived()
    assert not ask(pace, listener, launch_seconds=launch)
    assert ask(pace, listener, launch_seconds=launch)
    assert listener.asked == [pytest.approx(patience)]


def test_after_a_batch_that_found_a_task_waiting_it_looks_longer() -> None:
    pace, listener = Pace(None), Listener()
    pace.batch_done()
    pace.task_arrived()
    assert not ask(pace, listener)
    assert ask(pace, listener)
    assert listener.asked == [pace_module.LOOK]


def test_when_looking_longer_brought_nothing_it_glances_again() -> None:
    pace, listener = Pace(None), Listener()
    pace.batch_done()
    pace.task_arrived()
    ask(pace, listener)
    ask(pace, listener)
    pace.batch_done()
    ask(pace, listener)
    assert listener.asked == [pace_module.LOOK, pace_module.GLANCE]


def test_a_delay_of_zero_never_waits() -> None:
    listener = Listener()
    assert ask(Pace(0.0), listener)
    assert listener.asked == []


def test_while_tasks_come_a_delay_does_not_keep_the_hub_from_fetching_the_next() -> None:
    pace, listener = Pace(60.0), Listener()
    pace.task_arrived()
    assert not ask(pace, listener)
    assert listener.asked == []


def test_a_delay_that_the_user_chose_is_waited_for_unless_the_batch_is_full() -> None:
    pace, listener = Pace(60.0), Listener()
    assert not ask(pace, listener)
    assert listener.asked == [pace_module.MAX_LOOK]
    assert ask(pace, listener, full=True)


def test_listening_for_less_than_the_pollers_tick_asks_again_until_the_time_is_over() -> None:
    answers = iter([[], [], ["a socket"]])
    asked: list[float] = []

    def poll(seconds: float) -> object:
        asked.append(seconds)
        return next(answers)

    assert wakeup.listen(poll, wakeup.POLLER_TICK / 2)
    assert asked == [0, 0, 0]
    assert not wakeup.listen(lambda seconds: None, 0.0001)


def test_listening_for_longer_leaves_the_waiting_to_the_poller() -> None:
    listener = Listener(hears=True)
    assert wakeup.listen(listener, 0.01)
    assert listener.asked == [0.01]


def test_a_wakeup_is_waited_for_whatever_its_descriptors_number() -> None:
    """A worker with a thousand connections has larger numbers than `select.select` takes."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 1500:
        pytest.skip("this shell allows no such number: ulimit -n")
    subject = Wakeup()
    with subject._reader as low:
        subject._reader = socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD, 1500))
    subject.wait(0.01)
    subject.set()
    subject.wait(10)
    subject.clear()
    subject.close()
