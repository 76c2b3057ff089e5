"""Which statements of SQLAlchemy take locks, and for how long: until their transaction is over, or their rows are read.

In: a statement, and the connection that executes it. Out: whether it may wait for another transaction or make one
wait, and whether this is still so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet, ref

#: Databases that keep old rows for readers: a plain `SELECT` neither waits for a writer nor holds one up.
READERS_PASS = ("postgresql", "mysql", "mariadb", "oracle")

#: Isolation levels under which a plain `SELECT` counts, too: if two such transactions overlap, one ends in an error.
READERS_COUNT = ("SERIALIZABLE", "REPEATABLE READ")

#: The beginning of a statement that takes no lock.
READ = re.compile(
    r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*"
    r"(?:SELECT|WITH|VALUES|TABLE|SHOW|EXPLAIN|DESCRIBE|SET|SAVEPOINT|RELEASE|ROLLBACK|BEGIN|COMMIT)\b",
    re.IGNORECASE | re.DOTALL,
)

#: Words that make such a statement take a lock: writes in a `WITH`, `FOR UPDATE`, `FOR SHARE`, `pg_advisory_lock()`.
LOCK = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE|INTO|SHARE)\b|LOCK", re.IGNORECASE)

#: Statements that wait for readers, too, since they change the table itself.
READERS_WAIT = re.compile(
    r"\s*(?:ALTER|DROP|TRUNCATE|LOCK|RENAME|VACUUM|REINDEX|CLUSTER|REFRESH|OPTIMIZE)\b", re.IGNORECASE
)

#: The number of statements whose meaning is remembered: enough for a project's own texts.
STATEMENTS = 1024


@lru_cache(STATEMENTS)
def takes_locks(statement: str) -> bool:
    """Tell whether a statement may wait for another transaction or make one wait, on a database of `READERS_PASS`."""
    return READ.match(statement) is None or LOCK.search(statement) is not None


class Transaction:
    """A transaction that took locks."""

    def __init__(self, connection: Any) -> None:
        self._connection = ref(connection)
        root = connection.get_transaction()
        #: SQLAlchemy's transaction, which it drops at the end; gives None if each statement is a transaction.
        self.about: Callable[[], Any] = (lambda: None) if root is None else ref(root)

    def is_held(self) -> bool:
        """Tell whether the transaction is still open."""
        connection, root = self._connection(), self.about()
        if connection is None or root is None or not root.is_active:
            return False
        return connection.invalidated or not _commits_by_itself(connection)


class SqliteTransaction(Transaction):
    """A transaction on SQLite: the driver begins it late, and unread rows hold a lock, too."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        #: The driver's cursors of results with unread rows. A result drops its cursor after its last row.
        self.cursors: WeakSet[Any] = WeakSet()
        #: Whether it read `FOR UPDATE`. SQLite ignores that, so it is kept here.
        self.is_for_update = False

    def is_held(self) -> bool:
        """Tell whether the driver is in a transaction, rows are unread, or a row was read `FOR UPDATE`."""
        connection = self._connection()
        if connection is None or connection.closed or connection.invalidated:
            return False
        if self.cursors:
            return True
        if self.about() is not connection.get_transaction() or not connection.in_transaction():
            return False
        return self.is_for_update or bool(getattr(_driver(connection), "in_transaction", True))


def _driver(connection: Any) -> Any:
    return connection.connection.dbapi_connection


def _commits_by_itself(connection: Any) -> bool:
    """Tell whether each statement is its own transaction."""
    try:  # SQLAlchemy 2.1
        return bool(connection.dialect.detect_autocommit_setting(_driver(connection)))
    except (AttributeError, NotImplementedError):
        return getattr(_driver(connection), "autocommit", False) is True


def is_for_update(context: Any) -> bool:
    """Tell whether the program wrote `with_for_update()`, which SQLAlchemy leaves out of SQLite's statement."""
    statement = getattr(getattr(context, "compiled", None), "statement", None)
    return getattr(statement, "_for_update_arg", None) is not None


def readers_count(connection: Any) -> bool:
    """Tell whether the program has set an isolation level of `READERS_COUNT` for the connection."""
    level = connection.get_execution_options().get("isolation_level")
    level = level or getattr(connection.dialect, "_on_connect_isolation_level", None)
    return level in READERS_COUNT


def keep_weakly(context: Any, cursor: Any) -> bool:
    """Let only the result keep the driver's cursor: its context would keep the cursor after the last row."""
    driver: Any = sys.modules.get("sqlite3")
    if driver is None or not isinstance(cursor, driver.Cursor):
        return False
    context.cursor = SimpleNamespace(
        rowcount=cursor.rowcount, lastrowid=cursor.lastrowid, description=cursor.description
    )
    return True
