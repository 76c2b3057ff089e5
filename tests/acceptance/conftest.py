"""What the acceptance tests share: workers on both sides, and what their models answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import SIDES, Sides, StartWorker, Worker


@pytest.fixture
def sides(start_worker: StartWorker) -> Sides:
    """Workers of this test's own."""
    return Sides(start_worker)


@pytest.fixture(scope="module", params=SIDES)
def worker(request: pytest.FixtureRequest, start_module_worker: StartWorker) -> Worker:
    """A worker under stock Celery and then one under ModelPool: what a test asks of both must be equal."""
    return Sides(start_module_worker).worker(request.param)


@pytest.fixture(scope="module")
def model_pool(start_module_worker: StartWorker) -> Worker:
    """A worker under ModelPool that a module's tests share."""
    return Sides(start_module_worker).worker("modelpool")


@pytest.fixture
def simulated() -> Callable[[Any], list[float]]:
    """What the simulated model answers for an item."""
    from legit_worker.testing import vector

    return lambda item: [float(value) for value in vector(str(item))]
