"""Transactions that belong to the thread, and so to all tasks.

In: Django, if the project uses it. Out: whether a transaction is open that another task's queries would join.
"""

from __future__ import annotations

import sys
from typing import Any


def in_django_transaction() -> bool:
    """Tell whether this thread has a transaction open on any connection. Imports nothing, connects nowhere."""
    db: Any = sys.modules.get("django.db")
    conf: Any = sys.modules.get("django.conf")
    if db is None or conf is None or not conf.settings.configured:
        return False
    return any(map(_is_open, db.connections.all(initialized_only=True)))


def _is_open(connection: Any) -> bool:
    """Tell whether the connection is inside `transaction.atomic`, or its project manages transactions by hand.

    By hand, the first query opens a transaction, and nothing tells when it is over.
    """
    return bool(connection.in_atomic_block or (connection.connection is not None and not connection.autocommit))
