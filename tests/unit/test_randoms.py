"""Random numbers, kept apart per task."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from legit_worker.device import randoms

#: Each library's way to seed, and to draw.
LIBRARIES: dict[str, tuple[Callable[[int], object], Callable[[], float]]] = {
    "random": (random.seed, random.random),
    "gauss": (random.seed, lambda: random.gauss(0, 1)),
    "numpy": (np.random.seed, lambda: float(np.random.rand())),
    "numpy's normal": (np.random.seed, lambda: float(np.random.randn())),
    "torch": (torch.manual_seed, lambda: float(torch.rand(1, dtype=torch.float64))),
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> tuple[Callable[[int], object], Callable[[], float]]:
    """One after the other."""
    return LIBRARIES[request.param]


def numbers(library: tuple[Callable[[int], object], Callable[[], float]], seed: int, count: int) -> list[float]:
    seed_with, draw = library
    seed_with(seed)
    return [draw() for _ in range(count)]


def test_a_seeded_task_goes_on_where_it_stopped(library: tuple[Callable[[int], object], Callable[[], float]]) -> None:
    expected, draw, task = numbers(library, 7, 6), library[1], object()
    assert numbers(library, 7, 2) == expected[:2]
    for part in (expected[2:4], expected[4:]):
        resume = randoms.suspend(task)
        draw()
        resume()
        assert [draw() for _ in part] == part
    randoms.end(task)


def test_tasks_with_the_same_seed_each_get_its_numbers(
    library: tuple[Callable[[int], object], Callable[[], float]],
) -> None:
    expected, draw = numbers(library, 7, 3), library[1]
    for task in (object() for _ in range(3)):
        numbers(library, 7, 1)
        resume = randoms.suspend(task)
        draw()
        resume()
        assert [draw(), draw()] == expected[1:]
        library[0](7)
        draw()
        randoms.end(task)


def test_no_two_tasks_draw_the_same_numbers(library: tuple[Callable[[int], object], Callable[[], float]]) -> None:
    draw = library[1]
    numbers(library, 7, 1)
    drawn, parked = [], []
    for _ in range(20):
        drawn.append(draw())
        parked.append(randoms.suspend(object()))
        drawn.append(draw())
    for resume in parked:
        resume()
        drawn.append(draw())
        randoms.suspend(object())
    assert len(set(drawn)) == len(drawn)


def test_a_task_that_draws_nothing_leaves_the_others_numbers_alone(
    library: tuple[Callable[[int], object], Callable[[], float]],
) -> None:
    draw = library[1]
    randoms.suspend(object())
    expected = numbers(library, 7, 3)
    numbers(library, 7, 1)
    seeder, reader = object(), object()
    resume = randoms.suspend(seeder)
    randoms.suspend(reader)()
    resume()
    assert [draw(), draw()] == expected[1:]
    randoms.end(seeder)


def test_another_thread_is_left_alone() -> None:
    random.seed(7)
    expected = random.getstate()
    thread = threading.Thread(target=lambda: randoms.suspend(object()))
    thread.start()
    thread.join()
    assert random.getstate() == expected


def test_the_quick_look_sees_what_getstate_sees() -> None:
    look = randoms._look_at_random()
    assert look is not random.getstate
    before = look()
    assert look() == before
    random.random()
    assert look() != before
