"""What a task sets for itself, put aside and given back."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from celery._state import _set_task_join_will_block, task_join_will_block

from legit_worker.pool import own
from legit_worker.pool.own import Own


class LateError(Exception):
    """What a task's alarm raises."""


def ring(*_: object) -> None:
    raise LateError


class Ringer:
    """A handler with something of its own."""

    def __call__(self, *_: object) -> None:
        raise LateError

    def method(self, *_: object) -> None:
        raise LateError


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """As a worker has it at its start."""
    own.use()
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def make() -> Own:
    return Own("a task", lambda: None)


def test_settings_are_put_aside_once_and_given_back_as_they_were() -> None:
    subject, filters, joins = make(), warnings.filters, task_join_will_block()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = warnings.filters
        _set_task_join_will_block(not joins)
        signal.signal(signal.SIGALRM, ring)
        assert not subject.is_aside
        subject.put_aside()
        assert subject.is_aside
        assert (warnings.filters, task_join_will_block()) == (filters, joins)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
        subject.give_back()
        assert warnings.filters is inside
        assert task_join_will_block() is not joins
        assert signal.getsignal(signal.SIGALRM) is ring
        with pytest.raises(UserWarning):
            warnings.warn("an error in here", stacklevel=1)
    _set_task_join_will_block(joins)


def test_an_alarm_rings_where_the_task_is_told() -> None:
    subject = make()
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    subject.put_aside()
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        assert not any(signal.getitimer(signal.ITIMER_REAL))
    with pytest.raises(LateError):
        subject.ring()
    subject.give_back()
    assert not any(signal.getitimer(signal.ITIMER_REAL))


def test_an_alarm_goes_on_with_what_is_left_of_its_time_and_its_interval() -> None:
    subject = make()
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 100, 7)
    subject.put_aside()
    subject.ring()
    subject.give_back()
    left, every = signal.getitimer(signal.ITIMER_REAL)
    assert 90 < left <= 100
    assert every == pytest.approx(7)


def test_two_tasks_each_have_their_alarm() -> None:
    first, second = make(), make()
    for subject, seconds in ((first, 100), (second, 50)):
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        subject.put_aside()
    for subject, seconds in ((first, 100), (second, 50)):
        subject.give_back()
        assert signal.getitimer(signal.ITIMER_REAL)[0] == pytest.approx(seconds, abs=5)
        subject.put_aside()


def test_a_timer_that_ran_before_the_worker_is_left_alone() -> None:
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 100)
    own.use()
    subject = make()
    subject.put_aside()
    assert any(signal.getitimer(signal.ITIMER_REAL))
    subject.give_back()
    subject.end()
    assert any(signal.getitimer(signal.ITIMER_REAL))


def test_an_alarm_that_is_left_is_cancelled_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    signal.setitimer(signal.ITIMER_REAL, 100)
    make().end()
    assert not any(signal.getitimer(signal.ITIMER_REAL))
    assert "a task ended with an alarm set" in caplog.text


def test_filters_that_a_task_leaves_in_force_are_gone_with_it() -> None:
    filters = warnings.filters
    warnings.catch_warnings().__enter__()
    assert warnings.filters is not filters
    make().end()
    assert warnings.filters is filters


@pytest.mark.parametrize("handler", [ring, partial(ring, None), Ringer(), Ringer().method])
def test_what_a_signals_handler_raises_in_nobodys_code_is_logged(
    handler: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    signal.signal(signal.SIGALRM, handler)
    with own.outlive_handlers("the test's code"):
        signal.raise_signal(signal.SIGALRM)
    assert "A signal's handler raised in the test's code" in caplog.text


def test_what_nobodys_code_raises_itself_goes_on() -> None:
    signal.signal(signal.SIGALRM, ring)
    with pytest.raises(LateError), own.outlive_handlers("the test's code"):
        raise LateError
