"""An ordinary project whose tasks set for themselves what a process has only once.

In: what to set. Out: what a task finds of its own after a model call, or of others.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from project import app

import legit_worker


@app.task(name="strict")
def strict(item: str, alias: str) -> list[Any]:
    """Inside a section in which each warning is an error: the model's answer, and whether one is after the call."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [legit_worker.model(alias).map([item])[0], raises_a_warning()]


@app.task(name="lax")
def lax(item: str, alias: str) -> list[Any]:
    """The same without the section."""
    return [legit_worker.model(alias).map([item])[0], raises_a_warning()]


def raises_a_warning() -> bool:
    """Whether a warning is an error here."""
    try:
        warnings.warn("the task's own", stacklevel=1)
    except UserWarning:
        return True
    return False


@app.task(name="in_torch")
def in_torch(item: str, alias: str, way: str | None = None) -> list[Any]:
    """What torch makes inside a section of some kind: in the model, and in the task before and after the call."""
    with section(way):
        before = made()
        output = legit_worker.model(alias).map([item])[0]
        return [output, before, made()]


def made() -> list[str]:
    """A tensor's device and type, and what products round to."""
    import torch

    tensor = torch.ones(2)
    return [str(tensor.device), str(tensor.dtype), torch.get_float32_matmul_precision(), type(tensor).__name__]


@contextmanager
def section(way: str | None) -> Iterator[None]:
    """Something of torch's, set for a while."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if way == "device":
        with torch.device("meta"):
            yield
    elif way == "default device":
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)
    elif way == "default dtype":
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
    elif way == "precision":
        torch.set_float32_matmul_precision("medium")
        yield
        torch.set_float32_matmul_precision("highest")
    elif way == "dispatch mode":
        with FakeTensorMode():
            yield
    else:
        yield


@app.task(name="timed")
def timed(item: str, alias: str, seconds: float, more: float = 0) -> Any:
    """A model call and so many more seconds, within a time of the task's own."""

    def too_late(*_: Any) -> None:
        raise TimeoutError(item)

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        output = legit_worker.model(alias).map([item])[0]
        time.sleep(more)
    except TimeoutError as error:
        return f"too late: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return output


@app.task(name="leaves_alarm")
def leaves_alarm(item: str, seconds: float) -> None:
    """Ends before its time is over, and forgets to say so."""

    def too_late(*_: Any) -> None:
        raise TimeoutError(item)

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@app.task(name="seeded")
def seeded(item: str, alias: str, seed: int) -> list[list[float]]:
    """Random numbers before and after a model call, and those that the seed gives without one."""
    seed_all(seed)
    found = draw()
    legit_worker.model(alias).map([item])
    found += draw()
    seed_all(seed)
    return [found, draw() + draw()]


@app.task(name="unseeded")
def unseeded(item: str, alias: str) -> list[float]:
    """Random numbers before and after a model call."""
    found = draw()
    legit_worker.model(alias).map([item])
    return found + draw()


@app.task(name="forks")
def forks(item: str, alias: str, seconds: float) -> str:
    """What a forked child gets from a model, within this time."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(there, str(legit_worker.model(alias).map([item])[0]).encode())
        finally:
            os._exit(0)
    os.close(there)
    answered, _, _ = select.select([here], [], [], seconds)
    answer = os.read(here, 1000).decode() if answered else "the child hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(here)
    return answer


def seed_all(seed: int) -> None:
    """As a script does that is to give the same numbers each time."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw() -> list[float]:
    """A number of each kind."""
    import torch

    return [random.random(), float(np.random.rand()), float(torch.rand(1, dtype=torch.float64))]


@app.task(name="leaves_defaults")
def leaves_defaults(item: str, alias: str) -> Any:
    """Sets what torch makes by itself, and does not set it back."""
    import torch

    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    return legit_worker.model(alias).map([item])[0]


@app.task(name="child_returns")
def child_returns(item: str) -> str:
    """Forks a child that goes on with the task."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return f"{item}, by the parent"
    return f"{item}, by the child"
