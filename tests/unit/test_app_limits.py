"""What lets an app's tasks begin."""

from __future__ import annotations

from legit_worker.pool.backlog import SLACK, AppLimits, Backlog
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.running import Running
from legit_worker.settings import AppSettings


def task(app: str) -> Fiber:
    return Fiber(lambda: None, app=app, name=app)


def begun_by(limits: AppLimits, clock: list[float], until: float, step: float) -> int:
    """How many tasks of app `a` begin until then, with a look at each step."""
    count = 0
    while clock[0] < until:
        while limits.may_begin(fiber := task("a")):
            limits.begun(fiber)
            count += 1
        clock[0] += step
    return count


def test_over_a_long_time_as_many_begin_as_the_rate_says() -> None:
    for rate in ("100/s", "3/s", "0.5/s"):
        clock = [1000.0]
        limits = AppLimits({"a": AppSettings(rate=rate)}, Running(), lambda clock=clock: clock[0])
        number = float(rate[:-2])
        assert abs(begun_by(limits, clock, 1100.0, 0.25) - 100 * number) <= 1 + SLACK * number


def test_after_a_pause_no_more_begin_at_once_than_the_slack_has() -> None:
    clock = [1000.0]
    limits = AppLimits({"a": AppSettings(rate="8/s")}, Running(), lambda: clock[0])
    assert begun_by(limits, clock, 1000.001, 0.01) == 5
    clock[0] = 2000.0
    assert begun_by(limits, clock, 2000.001, 0.01) == 5


def test_no_more_run_than_may_and_the_line_behind_holds_up_no_other_app() -> None:
    running = Running()
    limits = AppLimits({"a": AppSettings(max_in_flight=1), "b": AppSettings()}, running)
    backlog = Backlog(limits.has)
    one, *others = [task(app) for app in ("a", "a", "b", "")]
    running.add(one)
    for fiber in others:
        backlog.append(fiber)
    assert [backlog.take(limits.may_begin) for _ in range(3)] == [others[1], others[2], None]
    assert limits.report(backlog) == {"a": {"in_flight": 1, "max_in_flight": 1, "rate": None, "waiting": 1}}
    running.discard(one)
    assert backlog.take(limits.may_begin) is others[0]
