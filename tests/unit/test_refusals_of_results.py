"""Which errors of a result backend are a refusal for good, and which ones a task waits for."""

from __future__ import annotations

import pytest
from celery.exceptions import BackendStoreError

from legit_worker.results.backend import is_refused
from legit_worker.results.patience import patiently


def test_a_backend_that_is_not_redis_and_gave_up_its_retries_has_refused_nothing() -> None:
    """A database with `result_backend_always_retry` raises this while it is away."""

    def store() -> None:
        raise BackendStoreError("failed to store result on the backend", task_id="one")

    found: list[bool] = []

    def waits(error: Exception) -> bool:
        found.append(is_refused(error))
        return False

    with pytest.raises(BackendStoreError) as raised:
        patiently(store, "its end to be stored", waits)
    assert [*found, is_refused(raised.value)] == [False, False]
