"""Preparing items: other tasks have their turns between them, and a long text is read on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextvars import Context
from typing import Any

import pytest

from legit_worker import parking
from legit_worker.models import preparing
from legit_worker.models.methods import Methods
from legit_worker.models.preparing import LONG, SLICE, Aside, prepare, take_turns


class Events(parking.Host):
    """Notes in which order things happen; time passes only if a test says so."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.now = 0.0

    def give_way(self, what: str) -> None:
        """Others run, for a second."""
        self.all.append("others")
        self.now += 1

    def wait(self, done: Future[Any], what: str, drive: parking.Drive | None, is_own: bool, loads: str | None) -> None:
        """Others run until then."""
        self.all.append("others")
        done.result()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    """All that happens in one test."""
    host = Events()
    monkeypatch.setattr(preparing, "monotonic", lambda: host.now)
    parking.use(host)
    yield host
    parking.stop()


class Model:
    """Takes a part of a slice, or more than one slice, to prepare an item."""

    alias = "one"

    def __init__(self, events: Events, part: float = 0.3) -> None:
        self._events = events
        self._part = part

    def preprocess(self, item: str) -> str:
        """As it came."""
        self._events.all.append(item)
        self._events.now += SLICE * self._part
        return item


def in_a_task(function: Any, *arguments: Any) -> Any:
    return Context().run(function, *arguments)


def test_others_run_after_each_slice(events: Events) -> None:
    assert in_a_task(prepare, Model(events), list("abcdefghij")) == list("abcdefghij")
    assert "".join(event if len(event) == 1 else "|" for event in events.all) == "abcd|efgh|ij"


def test_others_run_between_any_two_items_that_take_long(events: Events) -> None:
    in_a_task(prepare, Model(events, 3), list("abc"))
    assert events.all == ["a", "others", "b", "others", "c"]


def test_a_lone_item_lets_nobody_run(events: Events) -> None:
    in_a_task(prepare, Model(events, 100), ["a"])
    assert events.all == ["a"]


def test_others_run_between_calls_that_take_a_slice_together(events: Events) -> None:
    def check() -> None:
        for _ in range(5):
            take_turns("one")
            events.all.append("check")
            events.now += SLICE * 0.6

    in_a_task(check)
    assert events.all == ["check", "check", "others", "check", "check", "others", "check"]


def test_a_long_text_is_read_on_a_thread_while_others_may_enter_the_method(events: Events) -> None:
    methods, aside = Methods("one"), Aside()
    seen: list[Any] = []

    def read() -> str:
        with methods.lock:
            seen.append(threading.current_thread() is threading.main_thread())
        return "tokens"

    assert methods.alone("preprocess", aside.run, read, LONG) == "tokens"
    assert (seen, events.all) == ([False], ["others"])
    assert methods.alone("preprocess", aside.run, threading.current_thread, LONG - 1) is threading.main_thread()


def test_what_comes_while_a_long_text_is_read_is_read_after_it() -> None:
    aside, began, go = Aside(), threading.Event(), threading.Event()
    order: list[str] = []

    def read(name: str) -> threading.Thread:
        if name == "long":
            began.set()
            go.wait(20)
        order.append(name)
        return threading.current_thread()

    def ask(name: str, characters: int) -> None:
        threads.append(aside.run(lambda: read(name), characters))

    threads: list[threading.Thread] = []
    long = threading.Thread(target=ask, args=("long", LONG))
    long.start()
    assert began.wait(20)
    short = threading.Thread(target=ask, args=("short", 1))
    short.start()
    go.set()
    for asking in (long, short):
        asking.join(20)
    assert order == ["long", "short"]
    assert not {long, short} & set(threads)
    assert not aside.is_busy


def test_what_a_thread_raises_is_raised_where_it_was_asked() -> None:
    def fail() -> None:
        raise ValueError("no such token")

    aside = Aside()
    with pytest.raises(ValueError, match="no such token"):
        aside.run(fail, LONG)
    assert not aside.is_busy
