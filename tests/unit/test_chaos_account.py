"""The account of a run of chaos: each task is done, failed, dead or lost, and each further run has a reason."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "lib"))
account: Any = importlib.import_module("chaos_account")
plans: Any = importlib.import_module("chaos_plan")

#: Two workers.
ONE, OTHER = 1, 2


def errand(end: str = "SUCCESS", app: str | None = None, last_attempt: int = 0, parents: tuple[str, ...] = ()) -> Any:
    kind = plans.Kind(name="kind", task="task", end=end, app=app, last_attempt=last_attempt)
    return plans.Errand(id="task", kind=kind, number=0, parents=parents)


def run(begin: float, end: float | None = None, pid: int = ONE, *, attempt: int = 0, value: Any = 5) -> Any:
    """One that returned, or, without an end, did not."""
    if end is None:
        return account.Run(attempt=attempt, pid=pid, begin=begin)
    return account.Run(attempt=attempt, pid=pid, begin=begin, end=end, how="returns", value=value)


def verdict(*runs: Any, of: Any = None, **known: Any) -> Any:
    """Of a task that is stored as done unless something else is known."""
    runs_of = known.pop("parents", {}) | {"task": runs}
    evidence = {"sent": {"task": 1}, "stored": {"task": ("SUCCESS", 5)}} | known
    (one,) = account.judge([of or errand()], account.Evidence(runs=runs_of, **evidence))
    return one


def death(at: float) -> Any:
    return {ONE: account.Death(begin=at, end=at + 0.1, how="got SIGKILL")}


def trouble(begin: float, end: float, **more: Any) -> Any:
    return [account.Trouble(what="its connection was cut", begin=begin, end=end, **more)]


def test_notes_become_runs_also_when_one_worker_runs_a_task_twice_at_once() -> None:
    notes = [
        ("task", 0, ONE, 7, 1.0, "begins", None),
        ("task", 0, ONE, 8, 2.0, "begins", None),
        ("task", 0, ONE, 7, 3.0, "returns", 5),
        ("task", 0, ONE, 8, 4.0, "raises", "ValueError"),
        ("task", 0, OTHER, 7, 5.0, "begins", None),
    ]
    first, second, third = account.runs_of(notes)["task"]
    assert (first.begin, first.end, first.how, first.value) == (1.0, 3.0, "returns", 5)
    assert (second.begin, second.end, second.how, second.value) == (2.0, 4.0, "raises", "ValueError")
    assert (third.pid, third.begin, third.how) == (OTHER, 5.0, None)


def test_a_task_that_ran_once_is_done() -> None:
    one = verdict(run(1, 2))
    assert (one.end, one.again, one.problems) == ("done", (), ())


def test_a_task_without_a_result_is_lost() -> None:
    assert verdict(stored={}).end == "lost"
    assert verdict(run(1, 2), stored={}).problems == ("lost: attempt 0 returns 5",)


@pytest.mark.parametrize(
    ("stored", "end"), [(("FAILURE", "ValueError"), "own error"), (("FAILURE", "KeyError"), "wrong")]
)
def test_a_task_may_fail_with_its_own_error_only(stored: tuple[str, str], end: str) -> None:
    one = verdict(run(1, 2), of=errand("ValueError"), stored={"task": stored})
    assert (one.end, bool(one.problems)) == (end, end == "wrong")


def test_a_failure_of_a_task_that_should_succeed_is_wrong() -> None:
    assert verdict(run(1, 2), stored={"task": ("FAILURE", "ConnectionError")}).end == "wrong"


def test_a_result_must_be_what_one_of_the_runs_returned() -> None:
    assert verdict(run(1, 2), stored={"task": ("SUCCESS", 6)}).problems
    assert verdict(run(1), stored={"task": ("SUCCESS", 5)}).problems
    assert not verdict(run(1), run(3, 4, OTHER), deaths=death(2)).problems


@pytest.mark.parametrize("at", [1.5, 2.5])
def test_a_worker_that_dies_before_the_ack_is_a_reason_to_run_again(at: float) -> None:
    assert verdict(run(1, 2), run(9, 10, OTHER), deaths=death(at)).again == ("its worker got SIGKILL",)


@pytest.mark.parametrize("at", [0.5, 8])
def test_a_worker_that_dies_before_the_task_or_long_after_it_is_no_reason(at: float) -> None:
    one = verdict(run(1, 2), run(9, 10, OTHER), deaths=death(at))
    assert one.problems == ("ran again for no reason (returns at 2.00, again at 9.00)",)


def test_a_death_after_the_second_run_is_no_reason_for_it() -> None:
    assert verdict(run(1), run(2, 3, OTHER), deaths=death(4)).problems


def test_each_further_run_needs_a_reason_of_its_own() -> None:
    one = verdict(run(1), run(3, 4, OTHER), run(8, 9, OTHER), deaths={ONE: account.Death(begin=2, end=2, how="died")})
    assert one.again == ("its worker died", "its worker died")
    one = verdict(run(1, 2), run(9, 10, OTHER), run(20, 21, OTHER), troubles=trouble(12, 12.5))
    assert len(one.again) == 1
    assert len(one.problems) == 1


def test_a_connection_that_breaks_before_the_ack_is_a_reason() -> None:
    assert verdict(run(1, 2), run(9, 10, OTHER), troubles=trouble(2.5, 3)).again == ("its connection was cut",)
    assert verdict(run(1, 2), run(9, 10, OTHER), troubles=trouble(2.5, 3, pid=OTHER)).problems


def test_a_message_may_be_given_to_another_worker_before_its_task_begins() -> None:
    assert verdict(run(3, 4), run(5, 6, OTHER), troubles=trouble(1, 2)).again == ("its connection was cut",)
    assert verdict(run(30, 31), run(32, 33, OTHER), troubles=trouble(1, 2)).problems


def test_a_worker_that_was_stopped_runs_what_others_have_run_meanwhile() -> None:
    one = verdict(run(5, 6), run(9, 10, OTHER), troubles=trouble(1, 8, pid=OTHER))
    assert one.again == ("its connection was cut",)
    assert verdict(run(5, 6), run(30, 31, OTHER), troubles=trouble(1, 8, pid=OTHER)).problems


def test_a_server_that_is_away_puts_the_ack_off_and_is_itself_no_reason() -> None:
    away = trouble(1.5, 20, is_reason=False)
    assert verdict(run(1, 2), run(30, 31, OTHER), troubles=away).problems
    assert verdict(run(1, 2), run(30, 31, OTHER), troubles=away, deaths=death(21)).again


def test_a_message_that_was_sent_twice_may_run_twice() -> None:
    assert verdict(run(1, 2), run(3, 4), sent={"task": 2}).again == ("its message was sent again",)


def test_a_task_that_can_not_send_its_retry_runs_again() -> None:
    rejected = account.Run(attempt=0, pid=ONE, begin=1, end=2, how="raises", value="Reject")
    assert verdict(rejected, run(3, 4)).again == ("it could not send its retry",)


@pytest.mark.parametrize(("begin", "end"), [(1.5, "chord error"), (30, "wrong")])
def test_a_chord_may_break_while_a_server_is_away(begin: float, end: str) -> None:
    known = {"stored": {"task": ("FAILURE", "ChordError")}, "troubles": trouble(begin, begin + 1)}
    assert verdict(of=errand(parents=("part",)), parents={"part": [run(1, 2)]}, **known).end == end


@pytest.mark.parametrize("moves", [True, False])
def test_a_message_that_is_moved_is_there_twice_if_its_mover_dies(moves: bool) -> None:
    mover = {OTHER: account.Death(begin=2.5, end=2.5, how="got SIGKILL")}
    one = verdict(run(1, 2), run(3, 4), deaths=mover, moves=moves)
    assert (bool(one.again), bool(one.problems)) == (moves, not moves)


def test_what_a_task_sends_may_run_as_often_as_the_task() -> None:
    body = errand(parents=("part",))
    for parent_runs, is_fine in (([run(1), run(2, 3)], True), ([run(1, 2)], False)):
        one = verdict(run(4, 5), run(6, 7), of=body, parents={"part": parent_runs})
        assert bool(one.again) == is_fine
        assert bool(one.problems) != is_fine


@pytest.mark.parametrize(("begin", "is_reason"), [(1.5, True), (6, False)])
def test_what_a_task_sends_while_a_connection_breaks_may_be_sent_twice(begin: float, is_reason: bool) -> None:
    runs = run(1, 2, value="Retry"), run(10, 11, attempt=1), run(10.1, 11, attempt=1)
    one = verdict(*runs, of=errand(last_attempt=1), troubles=trouble(begin, begin + 0.5, is_reason=False))
    assert bool(one.again) == is_reason
    assert bool(one.problems) != is_reason


def test_attempts_of_a_retried_task_are_no_further_runs() -> None:
    attempts = [run(number, number + 0.5, attempt=number) for number in range(3)]
    assert verdict(*attempts, of=errand(last_attempt=2)).again == ()


def test_a_poisoned_task_is_a_failure_and_a_dead_letter() -> None:
    poisoned = errand("PoisonedMessageError")
    stored = {"task": ("FAILURE", "PoisonedMessageError")}
    dead = {"task": ["delivered 5 times"]}
    assert verdict(of=poisoned, stored=stored, dead=dead).end == "dead letter"
    assert verdict(of=poisoned, stored=stored).problems
    assert verdict(run(1, 2), dead=dead).problems, "a neighbour of a poisoned one"


@pytest.mark.parametrize(
    ("is_told", "deaths", "end"), [(True, 5, "dead letter"), (True, 4, "wrong"), (False, 5, "wrong")]
)
def test_a_task_that_was_killed_often_enough_is_taken_for_one_that_kills(is_told: bool, deaths: int, end: str) -> None:
    runs = [run(10 * pid, pid=pid) for pid in range(deaths)]
    known = {
        "deaths": {
            pid: account.Death(begin=10 * pid + 1, end=10 * pid + 1, how="died", is_told=is_told)
            for pid in range(deaths)
        },
        "stored": {"task": ("FAILURE", "PoisonedMessageError")},
        "dead": {"task": ["delivered 5 times"]},
    }
    assert verdict(*runs, **known).end == end


@pytest.mark.parametrize(("others", "end"), [(4, "dead letter"), (3, "wrong")])
def test_workers_that_died_before_it_began_count_as_well(others: int, end: str) -> None:
    """They had its message, and nobody noted that. The last one was killed while the task ran alone."""
    known = {
        "deaths": {pid: account.Death(begin=10 * pid, end=10 * pid + 1, how="died") for pid in range(others + 1)},
        "stored": {"task": ("FAILURE", "PoisonedMessageError")},
        "dead": {"task": ["delivered 5 times"]},
    }
    assert verdict(run(10 * others - 1, pid=others), **known).end == end


def letter(status: str = "SUCCESS", value: Any = 5, attempt: int = 1) -> Any:
    return account.Letter(attempt=attempt, status=status, value=value)


def test_an_app_gets_each_end_perhaps_twice() -> None:
    for letters in ([letter()], [letter(), letter()]):
        assert not verdict(run(1, 2), of=errand(app="here"), letters={"task": letters}).problems


@pytest.mark.parametrize(
    "letters",
    [[], [letter(attempt=2)], [letter(value=6)], [letter(), letter("FAILURE", "OperationalError")]],
    ids=["none", "of another attempt", "of another result", "two contradictory ones"],
)
def test_an_app_that_is_told_something_else_or_nothing_is_a_problem(letters: list[Any]) -> None:
    assert verdict(run(1, 2), of=errand(app="here"), letters={"task": letters}).problems


def test_an_app_that_was_not_named_hears_nothing() -> None:
    assert verdict(run(1, 2), letters={"task": [letter()]}).problems


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_a_seed_replays_its_plan(broker: str) -> None:
    one = plans.plan(1000, 7, broker)
    assert one == plans.plan(1000, 7, broker)
    assert one != plans.plan(1000, 8, broker)
    assert len({errand.id for errand in one.errands}) == len(one.errands)
    assert abs(len(one.errands) - 1000) < 20


def test_a_plan_has_tasks_of_each_kind_and_a_body_for_each_chord() -> None:
    errands = plans.plan(300, 1, "redis").errands
    kinds = {errand.kind for errand in errands}
    assert kinds == {*plans.KINDS, plans.BODY, plans.POISON}
    for place, body in enumerate(errands):
        if body.kind is plans.BODY:
            assert body.parents == tuple(part.id for part in errands[place - plans.PARTS : place])


def test_faults_come_in_order_and_before_the_last_tasks() -> None:
    plan = plans.plan(2000, 3, "redis")
    at = [fault.at for fault in plan.faults]
    assert at == sorted(at)
    assert 0 < at[0] < at[-1] < len(plan.errands)


def test_half_a_note_of_a_killed_worker_is_no_end_and_spoils_no_other_note() -> None:
    lines = ['["one", 0, 1, 0, 1.5, "begins", null]', '["one", 0, 1, 0, 1.6, "returns", [0.5, 0.', "", '["two", 0]', ""]
    assert list(account.read_notes(lines)) == [["one", 0, 1, 0, 1.5, "begins", None], ["two", 0]]
