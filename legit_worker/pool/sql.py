"""SQLAlchemy under tasks that park: what each task has open, and who waits for whom.

In: SQLAlchemy's events, after a task's project has imported it; this module never imports it. Out: if a parked task's
transaction or connection would make another task wait in the database, that other task parks before it asks.

- Each database has a gate. A task takes the gate at its first statement that takes locks, and keeps it while it parks
  with this transaction open.
- Each bounded pool of connections has a line.
- Each task has its own `scoped_session`. If tasks share a session or a connection, no other task runs while it is in a
  transaction.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, wraps
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, ref

from legit_worker.device.imported import imported
from legit_worker.pool import fibers
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.locks import (
    READERS_PASS,
    READERS_WAIT,
    SqliteTransaction,
    Transaction,
    is_for_update,
    keep_weakly,
    readers_count,
    takes_locks,
)
from legit_worker.pool.turns import Gate, Line, drop_old

#: The connections that stay free for tasks which have one already, until a task has needed more.
SPARE = 1


class Use:
    """Whose a connection or a session is. Lives on the main thread, as long as the connection or session."""

    def __init__(self, thing: Any, owner: Fiber | None, *, is_only_one: bool = False) -> None:
        self._thing = ref(thing)
        # Tasks share it if it is older than they, if a second task came, or if its pool has only this connection.
        self._is_shared = owner is None or is_only_one
        self._user = None if owner is None else ref(owner)
        if owner is not None:
            owner.holdings.shared.add(self)

    @cached_property
    def _line(self) -> Line:
        return Line("another task's transaction", self._is_free, self._holders)

    def by(self, fiber: Fiber) -> None:
        """Let this task use it. If another task's transaction is open there, wait for the transaction's end."""
        if not self._is_by(fiber):
            with fiber.served():
                self._line.wait(fiber)
                self.begun_by(fiber)

    def begun_by(self, fiber: Fiber) -> None:
        """Note that this task has begun a transaction, so that no other can have one open there."""
        if not self._is_by(fiber):
            self._is_shared = True
            self._user = ref(fiber)
            fiber.holdings.shared.add(self)

    def _is_by(self, fiber: Fiber) -> bool:
        return self._user is not None and self._user() is fiber

    def keeps_others_out(self) -> bool:
        """Tell whether other tasks would work in this task's transaction."""
        return self._is_shared and self._is_in_the_middle()

    def _is_free(self, fiber: Fiber) -> bool:
        return not self._is_in_the_middle() or self._holders(fiber) in ([], [fiber])

    def _is_in_the_middle(self) -> bool:
        thing = self._thing()
        return thing is not None and bool(thing.in_transaction())

    def _holders(self, _: Fiber) -> list[Fiber]:
        user = None if self._user is None else self._user()
        return [] if user is None or user.dead else [user]


class ConnectionUse(Use):
    """Whose a connection is."""

    def is_out_of(self, pool: Any) -> bool:
        """Tell whether this pool (None: any pool) has given it out."""
        connection = self._thing()
        return connection is not None and not connection.closed and (pool is None or connection.engine.pool is pool)

    def is_in_transaction_on(self, database: Database) -> bool:
        """Tell whether it is in a transaction on this database."""
        connection = self._thing()
        is_there = connection is not None and _databases.get(connection.dialect) is database
        return is_there and self._is_in_the_middle()


class SessionUse(Use):
    """Whose a session is."""

    def _is_in_the_middle(self) -> bool:
        """Tell whether it is in a transaction, or has objects for its next one."""
        session = self._thing()
        return session is not None and bool(session.in_transaction() or session.new or session.dirty or session.deleted)


class Room:
    """A bounded pool of connections, and the line of tasks before it. Lives on the main thread."""

    def __init__(self, pool: Any, size: int) -> None:
        self._pool = ref(pool)
        self._size = size
        # The most connections that one task had at once, and the tasks that had one.
        self._most = 1 + SPARE
        self._guests: WeakSet[Fiber] = WeakSet()
        self._line = Line("a connection of a pool", self._has_place, self._holders)

    def enter(self, fiber: Fiber) -> None:
        """Wait for a connection. A task that others may wait for comes first, and may take the last connections."""
        if fiber.holdings.shared:
            self._most = max(self._most, self._count(fiber) + 1)
        if not self._has_place(fiber) or self._line.is_taken:
            self._line.wait(fiber, first=_has_any(fiber))
        self._guests.add(fiber)

    def _has_place(self, fiber: Fiber) -> bool:
        taken = self._taken()
        spare = 0 if _has_any(fiber) else self._most - 1
        return taken == 0 or taken + 1 + spare <= self._size

    def _holders(self, _: Fiber) -> list[Fiber]:
        """Return the tasks with a connection. None if a connection is not a task's: no line can wait for its owner."""
        counts = {fiber: self._count(fiber) for fiber in self._guests if not fiber.dead}
        self._guests = WeakSet(fiber for fiber, count in counts.items() if count)
        return [] if sum(counts.values()) < self._taken() else list(self._guests)

    def _taken(self) -> int:
        pool = self._pool()
        return 0 if pool is None else int(pool.checkedout())

    def _count(self, fiber: Fiber) -> int:
        return sum(use.is_out_of(self._pool()) for use in _connections(fiber))


def _connections(fiber: Fiber) -> Iterator[ConnectionUse]:
    return (use for use in fiber.holdings.shared if isinstance(use, ConnectionUse))


def _has_any(fiber: Fiber) -> bool:
    """Tell whether the task has a connection or a gate, so that others may wait for it."""
    return bool(fiber.holdings.gates) or any(use.is_out_of(None) for use in _connections(fiber))


class Database:
    """How tasks meet at one database. URLs that differ only in user and options are one database."""

    def __init__(self, name: str, backend: str) -> None:
        self._gate = Gate(f"database {name}")
        self._readers_pass = backend in READERS_PASS
        self._transaction = SqliteTransaction if backend == "sqlite" else Transaction
        # The tasks that have or had a connection.
        self._visitors: WeakSet[Fiber] = WeakSet()
        self._line = Line(
            f"all others at database {name}", lambda fiber: not self._others(fiber), self._others, needs_all=True
        )

    def visit(self, fiber: Fiber) -> None:
        """Note that the task has a connection."""
        self._visitors.add(fiber)

    def pass_by(self, fiber: Fiber, connection: Any, statement: str, context: Any) -> None:
        """Let the task execute this statement. Wait if another task's transaction may hold the statement up."""
        if self._readers_pass and not takes_locks(statement) and not readers_count(connection):
            return
        if self._readers_pass and READERS_WAIT.match(statement):  # first this line: others in it may wait for the gate
            self._line.wait(fiber)
        claims = self._gate.take(fiber)
        root = connection.get_transaction()
        claim = next((claim for claim in claims if claim.about() is root), None)
        if claim is None:
            claim = self._transaction(connection)
            drop_old(claims)  # a task that never parks would collect them
            claims.append(claim)
        if isinstance(claim, SqliteTransaction):
            claim.is_for_update = claim.is_for_update or is_for_update(context)

    def _others(self, fiber: Fiber) -> list[Fiber]:
        """Return the other tasks that are in a transaction."""
        others = [other for other in self._visitors if other is not fiber and not other.dead]
        return [other for other in others if any(use.is_in_transaction_on(self) for use in _connections(other))]

    def note_rows(self, fiber: Fiber, connection: Any, result: Any) -> None:
        """Note that the task has not read these rows yet."""
        root, cursor = connection.get_transaction(), result.cursor
        for claim in self._gate.claims(fiber) or ():
            if isinstance(claim, SqliteTransaction) and claim.about() is root and keep_weakly(result.context, cursor):
                claim.cursors.add(cursor)


#: Databases by `_key` and by dialect (each engine has its own), whose last dialect takes its database along; rooms by
#: pool; uses by connection or session.
_by_key: WeakValueDictionary[Any, Database] = WeakValueDictionary()
_databases: WeakKeyDictionary[Any, Database] = WeakKeyDictionary()
_rooms: WeakKeyDictionary[Any, Room | None] = WeakKeyDictionary()
_uses: WeakKeyDictionary[Any, Use] = WeakKeyDictionary()


def _database(connection: Any) -> Database:
    found = _databases.get(connection.dialect)
    if found is None:
        url = connection.engine.url
        key = _key(url, connection.dialect)
        found = _by_key.get(key) or Database(url.database or "in memory", url.get_backend_name())
        _by_key[key] = _databases[connection.dialect] = found
    return found


def _key(url: Any, dialect: Any) -> Any:
    if url.get_backend_name() != "sqlite":
        return url.get_backend_name(), url.host, url.port, url.database
    name = url.database or ""
    if not name or ":memory:" in name or "mode=memory" in str(url):
        return ref(dialect)
    return os.path.realpath(name.removeprefix("file:"))


def _room(pool: Any) -> Room | None:
    """Return the pool's room; None if the pool is unbounded, or of an unknown size."""
    if pool not in _rooms:
        overflow = getattr(pool, "_max_overflow", -1)
        _rooms[pool] = Room(pool, pool.size() + overflow) if overflow >= 0 else None
    return _rooms[pool]


def _use(thing: Any, fiber: Fiber) -> None:
    use = _uses.get(thing)
    if use is None:  # a connection that is older than `watch`, and so older than this task
        use = _uses[thing] = ConnectionUse(thing, None)
    use.by(fiber)


def _on_connect(connection: Any, *_: Any) -> None:
    pools = sys.modules["sqlalchemy.pool"]
    is_only_one = isinstance(connection.engine.pool, (pools.StaticPool, pools.SingletonThreadPool, pools.AssertionPool))
    fiber = fibers.current()
    _uses[connection] = ConnectionUse(connection, fiber, is_only_one=is_only_one)
    if fiber is not None:
        _database(connection).visit(fiber)


def _before_execute(connection: Any, _c: Any, statement: str, _p: Any, context: Any, *_: Any) -> None:
    fiber = fibers.current()
    if fiber is not None:
        _use(connection, fiber)
        _database(connection).pass_by(fiber, connection, statement, context)


def _after_execute(connection: Any, _c: Any, _m: Any, _p: Any, _o: Any, result: Any) -> None:
    if result.cursor is not None and connection.dialect.name == "sqlite":
        fiber = fibers.current()
        if fiber is not None:
            _database(connection).note_rows(fiber, connection, result)


def _on_session_begin(session: Any, transaction: Any) -> None:
    if transaction.parent is None:
        fiber = fibers.current()
        use = _uses.get(session)
        if use is None:
            is_old = session.hash_key < _first_session
            use = _uses[session] = SessionUse(session, None if is_old else fiber)
        if fiber is not None:
            use.begun_by(fiber)


def _on_session_use(session: Any, *_: Any) -> None:
    fiber = fibers.current()
    if fiber is not None and session in _uses:  # otherwise its first transaction has not begun yet
        was_in_transaction = session.in_transaction()
        _use(session, fiber)
        if was_in_transaction and not session.in_transaction():  # this task waited for the end of that transaction
            session.begin()


class PerTask:
    """Replaces an attribute that holds a thread's own value: a task gets its own value."""

    def __init__(self, owner: type) -> None:
        #: The slot that SQLAlchemy 2 keeps the value in; None for 1.4, which uses the object's dictionary.
        self._slot: Any = next((vars(base)["registry"] for base in owner.__mro__ if "registry" in vars(base)), None)

    def __get__(self, thing: Any, owner: type | None = None) -> Any:
        """Return the task's value; outside a task, the thread's."""
        if thing is None:
            return self
        fiber = fibers.current()
        if fiber is None:
            return vars(thing)["registry"] if self._slot is None else self._slot.__get__(thing)
        if thing not in fiber.holdings.own:
            namespace = fiber.holdings.own[thing] = SimpleNamespace()
            fiber.holdings.at_end.append(lambda: _close(namespace))
        return fiber.holdings.own[thing]

    def __set__(self, thing: Any, value: Any) -> None:
        """Set the thread's value."""
        if self._slot is None:
            vars(thing)["registry"] = value
        else:
            self._slot.__set__(thing, value)


def _close(namespace: SimpleNamespace) -> None:
    """Close a task's session at its end: nobody can use it any more."""
    session = getattr(namespace, "value", None)
    if isinstance(session, sys.modules["sqlalchemy.orm"].Session):
        session.close()


def _watch_core() -> None:
    sqlalchemy: Any = sys.modules["sqlalchemy"]
    listen, engine, pool = sqlalchemy.event.listen, sqlalchemy.engine.Engine, sqlalchemy.pool.Pool
    listen(engine, "engine_connect", _on_connect)
    listen(engine, "before_cursor_execute", _before_execute)
    listen(engine, "after_execute", _after_execute)
    connect = pool.connect

    @wraps(connect)
    def connect_in_turn(self: Any) -> Any:
        fiber = fibers.current()
        room = None if fiber is None else _room(self)
        if fiber is not None and room is not None:
            room.enter(fiber)
        return connect(self)

    pool.connect = connect_in_turn


def _watch_orm() -> None:
    global _first_session
    sqlalchemy: Any = sys.modules["sqlalchemy"]
    listen, session = sqlalchemy.event.listen, sqlalchemy.orm.Session
    # SQLAlchemy numbers sessions. A lower number than this session's is older than the first task.
    _first_session = session().hash_key
    listen(session, "after_transaction_create", _on_session_begin)
    listen(session, "before_attach", _on_session_use)
    listen(session, "before_flush", _on_session_use)
    listen(session, "do_orm_execute", lambda execution: _on_session_use(execution.session))
    registry = sqlalchemy.util.ThreadLocalRegistry
    registry.registry = PerTask(registry)


_first_session = 0

#: The modules that are not imported and watched yet.
_unwatched: dict[str, Callable[[], None]] = {"sqlalchemy": _watch_core, "sqlalchemy.orm": _watch_orm}


def watch() -> None:
    """Watch the modules that have been imported by now. Called before a task runs; imports nothing."""
    for name in tuple(_unwatched):
        if imported(name) is not None:
            _unwatched.pop(name)()


def is_blind() -> bool:
    """Tell whether the running task has imported a module that is not watched: it may have an unseen transaction."""
    return any(name in sys.modules for name in _unwatched)
