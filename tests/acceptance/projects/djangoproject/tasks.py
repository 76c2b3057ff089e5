"""Tasks that write rows, in transactions and outside of them, and call models in between.

In: an item, and how the task is to end. Out: rows with that item, `before` and `after` its model calls.
"""

from __future__ import annotations

from typing import Any

from celery import shared_task
from django.db import transaction

import legit_worker
from djangoproject.models import Row


class Steps:
    """How often any task got past a model call."""

    taken = 0


steps = Steps()


def write(item: str, step: str, database: str = "default") -> None:
    """One row."""
    Row.objects.using(database).create(item=item, step=step)


def call_model(item: Any) -> int:
    """Under ModelPool others may run meanwhile: how often one of them got past a model call."""
    taken = steps.taken
    legit_worker.model("sim").map([item])
    steps.taken += 1
    return steps.taken - taken - 1


@shared_task(name="writes")
def writes(item: str, fails: bool, database: str = "default") -> int:
    """Two rows, or none; how many other tasks got past a model call meanwhile."""
    with transaction.atomic(using=database):
        write(item, "before", database)
        others = call_model(item)
        write(item, "after", database)
        if fails:
            raise ValueError(f"{item} fails")
    return others


@shared_task(name="writes_nested")
def writes_nested(item: str) -> list[int]:
    """What the inner block wrote goes, what the outer one wrote stays."""
    with transaction.atomic():
        write(item, "before")
        try:
            with transaction.atomic():
                write(item, "inner")
                call_model(item)
                raise ValueError("the inner one fails")
        except ValueError:
            others = call_model(f"{item} again")
        write(item, "after")
    return [others, Row.objects.filter(item=item).count()]


@shared_task(name="writes_by_hand")
def writes_by_hand(item: str, fails: bool) -> int:
    """The same without a block: Django lets a task switch autocommit off."""
    transaction.set_autocommit(False)
    try:
        write(item, "before")
        others = call_model(item)
        write(item, "after")
        if fails:
            raise ValueError(f"{item} fails")
        transaction.commit()
    except ValueError:
        transaction.rollback()
        raise
    finally:
        transaction.set_autocommit(True)
    return others


@shared_task(name="tells_when_committed")
def tells_when_committed(item: str, fails: bool) -> None:
    """Once its own transaction is committed, and not before; never if it is not."""
    with transaction.atomic():
        transaction.on_commit(lambda: write(item, f"committed after {Row.objects.filter(item=item).count()}"))
        write(item, "before")
        call_model(item)
        write(item, "after")
        if fails:
            raise ValueError(f"{item} fails")


@shared_task(name="writes_without_transaction")
def writes_without_transaction(item: str) -> None:
    """Each row is there at once."""
    write(item, "before")
    call_model(item)
    write(item, "after")
