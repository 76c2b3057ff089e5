"""A result is shown as Celery shows it."""

from __future__ import annotations

from typing import Any

import pytest
from celery.app import trace
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.pool.telling import is_alike, show_quickly, shown

#: Celery before 5.7 cuts in another place, and its own way stays.
pytestmark = pytest.mark.skipif(not is_alike(), reason="this release of Celery shows floats in another way")

others = st.one_of(st.integers(), st.text(), st.none(), st.lists(st.floats()), st.dictionaries(st.text(), st.floats()))


@given(st.lists(st.floats(), max_size=80), st.lists(others, max_size=3), st.integers(1, 1200))
def test_floats_and_what_follows_them_are_shown_as_by_celery(floats: list[float], rest: list[Any], length: int) -> None:
    assert shown(floats + rest, length) == saferepr(floats + rest, length)


def test_celery_uses_it_while_somebody_sees_it_until_that_is_undone() -> None:
    is_seen = True
    undo = show_quickly(lambda: is_seen)
    assert trace.saferepr([0.5]) == "[0.5]"
    is_seen = False
    assert trace.saferepr([0.5]) == ""
    undo()
    assert trace.saferepr is saferepr
