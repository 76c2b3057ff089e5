"""A set of weak references that one thread changes while another goes through it."""

from __future__ import annotations

import gc
import threading

from legit_worker.broker.weakly import Weakly


class Thing:
    """What may go."""


def test_what_nobody_else_has_is_gone() -> None:
    some: Weakly[Thing] = Weakly()
    kept, gone = Thing(), Thing()
    for thing in (kept, gone, kept):
        some.add(thing)
    assert set(some) == {kept, gone}
    del thing, gone
    gc.collect()
    assert list(some) == [kept]
    some.discard(kept)
    some.discard(kept)
    assert not some


def test_others_come_and_go_meanwhile() -> None:
    """`list` of a `weakref.WeakSet` raises `RuntimeError` here."""
    some: Weakly[Thing] = Weakly()
    kept = [Thing() for _ in range(50)]
    for thing in kept:
        some.add(thing)
    is_over = threading.Event()

    def churn() -> None:
        while not is_over.is_set():
            one = Thing()
            some.add(one)
            some.discard(one)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert all(set(kept) <= set(some) for _ in range(3000))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
