"""The pytest plugin, which pytest finds by itself once legit_worker is installed: fixtures for a project's own tests.

In: nothing. Out: simulated models, an app that needs no server, and batches to count. It stands outside the package,
because `import legit_worker` imports Celery: a test run that asks for none of these fixtures imports nothing of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery import Celery

    from legit_worker.models.registry import Registry


@pytest.fixture
def legit_models() -> Iterator[Callable[..., Registry]]:
    """Put models in place of the environment's until the test ends: `legit_models("minilm")`.

    A name alone is a simulated model, whose output for a text is `legit_worker.testing.vector(text)`. Keywords are
    settings of a model: `legit_models(minilm={"kind": "simulated", "path": "0.01,0"})`. Another call adds models.
    """
    from legit_worker.testing import use_models

    known: dict[str, Any] = {}
    with ExitStack() as stack:

        def use(*aliases: str, **models: Any) -> Registry:
            known.update({alias: {"kind": "simulated"} for alias in aliases} | models)
            return stack.enter_context(use_models(known))

        yield use


@pytest.fixture
def legit_app() -> Iterator[Celery]:
    """A Celery app that needs no server, with the built-in tasks: see `legit_worker.testing.memory_app`."""
    from legit_worker.testing import memory_app

    with memory_app() as app:
        yield app


@pytest.fixture
def assert_batched() -> Callable[..., list[Any]]:
    """Assert that calls which come together share batches: see `legit_worker.testing.assert_batched`."""
    from legit_worker.testing import assert_batched

    return assert_batched
