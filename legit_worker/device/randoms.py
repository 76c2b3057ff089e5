"""Random numbers, kept apart per task: from `random`, from numpy's old functions, and from torch on the CPU.

Each is one stream of numbers for the whole process. In: a task that parks or calls a model, and has seeded a stream, or
drawn from it. Out: the task goes on in the stream where it stopped, whoever drew meanwhile.

No two tasks get copies of one stream: the numbers that they draw, for names of files say, must differ. So others get a
fresh stream, and not the one from before. A look at all three streams takes 3 µs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from legit_worker.device.imported import imported

#: Bytes of a Mersenne Twister's state in C: 624 words and the place in them.
STATE_BYTES = 625 * 4


class Stream:
    """One library's."""

    def __init__(
        self,
        look: Callable[[], Any],
        get: Callable[[], Any],
        set: Callable[[Any], Any],
        renew: Callable[[], Any],
    ) -> None:
        """`look` gives what differs after each number. `get` and `set` are its state, `renew` begins a fresh one."""
        self._look, self._get, self._set, self._renew = look, get, set, renew
        # As it was when it last began, or was given back; None before that.
        self._seen: Any = None
        # Whom it was given back to.
        self._owner: object = None

    def suspend(self, owner: object) -> Callable[[], None] | None:
        """Give others a fresh stream. Returns what gives `owner` its own again; None if it has none."""
        if self._owner is not owner and self._look() == self._seen:
            return None
        state = self._get()
        self._renew()
        self._seen, self._owner = self._look(), None
        return functools.partial(self._resume, state, owner)

    def end(self, owner: object) -> None:
        """`owner` is over. What it leaves may be what the next task's seed gives, and would not look as if it moved."""
        if self._owner is owner:
            self._renew()
            self._seen, self._owner = self._look(), None

    def _resume(self, state: Any, owner: object) -> None:
        self._set(state)
        self._seen, self._owner = self._look(), owner


def suspend(owner: object) -> Callable[[], None]:
    """Give others fresh streams in place of those that were moved. Returns what gives the caller its own again.

    `owner`: the same object for all calls of one task, and of no other that may be waiting. Does nothing on threads
    other than the main one, which draw from its streams.
    """
    if threading.current_thread() is not threading.main_thread():
        return _nothing
    restore = [step for stream in _streams() if (step := stream.suspend(owner)) is not None]

    def resume() -> None:
        for step in restore:
            step()

    return resume if restore else _nothing


def end(owner: object) -> None:
    """The task is over: nobody goes on in its streams."""
    for stream in _streams():
        stream.end(owner)


def _streams() -> tuple[Stream, ...]:
    return _always() if imported("torch") is None else (*_always(), _torch_stream())


@functools.cache
def _always() -> tuple[Stream, Stream]:
    numpys = np.random.get_state
    return (
        Stream(_look_at_random(), random.getstate, random.setstate, random.seed),
        Stream(_look_at_numpy(), lambda: numpys(legacy=False), np.random.set_state, _renew_numpy),
    )


def _look_at_random() -> Callable[[], Any]:
    """The state's bytes, in 0.1 µs if they are at CPython's own place; `getstate` makes 625 numbers in 7 µs."""
    try:
        inside = (ctypes.c_char * STATE_BYTES).from_address(id(random._inst) + object.__basicsize__)
    except AttributeError:
        return random.getstate
    words, place = (state := random.getstate()[1])[:-1], state[-1]
    is_known = random._inst.__sizeof__() >= object.__basicsize__ + STATE_BYTES
    if is_known and inside.raw == struct.pack("=i624I", place, *words):
        return lambda: inside.raw
    return random.getstate


def _look_at_numpy() -> Callable[[], Any]:
    """The state's bytes, 0.1 µs, where numpy says they are; `get_state` takes 30 µs."""
    generator = getattr(np.random, "get_bit_generator", lambda: None)()  # numpy 1.24
    if type(generator) is not np.random.MT19937:
        return lambda: str(np.random.get_state(legacy=False))
    inside = (ctypes.c_char * STATE_BYTES).from_address(generator.ctypes.state_address)
    return lambda: inside.raw


def _renew_numpy() -> None:
    """As `seed()` does, which takes 0.2 ms for more of the system's entropy."""
    np.random.seed(np.frombuffer(os.urandom(16), np.uint32))


@functools.cache
def _torch_stream() -> Stream:
    generator = imported("torch").default_generator
    return Stream(
        lambda: generator.get_state().numpy().tobytes(), generator.get_state, generator.set_state, generator.seed
    )


def _nothing() -> None:
    pass
