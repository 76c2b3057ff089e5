"""SQLAlchemy under tasks that park: who goes on, who waits, and what stands in the database in the end."""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from celery.exceptions import SoftTimeLimitExceeded
from jobs import job
from sqlalchemy import Engine, ForeignKey, create_engine, event, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool, StaticPool

from legit_worker import exclusive
from legit_worker.pool import fibers, locks, sql, turns
from legit_worker.pool.fibers import Fiber, Phase

#: More than a pool of SQLAlchemy's has connections by default.
TASKS = 30


class Base(DeclarativeBase):
    """The tables of these tests."""


class Row(Base):
    """One task's."""

    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[str] = mapped_column(default="before")


class Part(Base):
    """What belongs to a row."""

    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)
    row_id: Mapped[int] = mapped_column(ForeignKey("row.id"))


class Loop:
    """What the pool does: starts tasks, computes what is parked as a batch, resumes. Simulates every model."""

    def __init__(self) -> None:
        self.ready: deque[Fiber] = deque()
        self.parked: list[Fiber] = []
        #: Tasks per batch, and model calls that let nobody run.
        self.batches: list[int] = []
        self.alone = 0
        self.errors: list[BaseException] = []

    def model(self) -> None:
        """A task calls it. Parks where it may."""
        fiber = fibers.current()
        assert fiber is not None
        if not fiber.may_park():
            self.alone += 1
            return
        self.parked.append(fiber)
        fiber.park("a model")

    def wake(self, fiber: Fiber) -> None:
        """As the pool does."""
        if not fiber.woken:
            fiber.woken = True
            self.ready.append(fiber)

    def start(self, task: Callable[[], Any], name: str = "task", **options: Any) -> Fiber:
        """As a message comes."""
        fiber = Fiber(job(task).run, app="", name=name, wake=self.wake, **options)
        sql.watch()
        self.switch(fiber.resume)
        return fiber

    def switch(self, resume: Callable[[], None]) -> None:
        try:
            resume()
        except Exception as error:
            self.errors.append(error)

    def turn(self) -> bool:
        """Whether anything was left to do."""
        if self.ready:
            self.switch(self.ready.popleft().resume)
        elif self.parked:
            self.batches.append(len(self.parked))
            for fiber in self.parked:
                self.wake(fiber)
            self.parked.clear()
        else:
            turns.look()
            return bool(self.ready)
        return True

    def run(self, *tasks: Callable[[], Any]) -> None:
        """All of them, to their end."""
        started = [self.start(task, f"task {number}") for number, task in enumerate(tasks)]
        while self.turn():
            pass
        assert all(fiber.dead for fiber in started), started


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    turns.use(sql.is_blind)
    sql.watch()
    yield loop
    turns.use(lambda: False)


#: Who waits for a lock in vain, waits this long, in seconds.
PATIENCE = 0.2


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(tmp_path)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def make_engine(folder: Path, **options: Any) -> Engine:
    """Another one of the same database."""
    connect = {"timeout": PATIENCE, **options.pop("connect_args", {})}
    return create_engine(f"sqlite:///{folder / 'rows.db'}", connect_args=connect, **options)


def rows(engine: Engine) -> dict[int, str]:
    """What stands in the database."""
    with engine.connect() as connection:
        return {row.id: row.step for row in connection.execute(select(Row.id, Row.step))}


def adds(loop: Loop, engine: Engine, number: int, fails: bool = False) -> None:
    with Session(engine) as session:
        row = Row(id=number)
        session.add(row)
        session.flush()
        loop.model()
        row.step = "after"
        if fails:
            raise ValueError(number)
        session.commit()


def inserts(loop: Loop, engine: Engine, number: int) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Row).values(id=number))
        loop.model()
        connection.execute(update(Row).where(Row.id == number).values(step="after"))


def inserts_by_text(loop: Loop, engine: Engine, number: int) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"insert into row (id, step) values ({number}, 'before')")
        loop.model()
        connection.execute(text("update row set step = 'after' where id = :id"), {"id": number})


def inserts_in_a_savepoint(loop: Loop, engine: Engine, number: int) -> None:
    with Session(engine) as session, session.begin():
        with session.begin_nested():
            session.add(Row(id=number))
            session.flush()
            loop.model()
        with session.begin_nested() as inner:
            session.add(Row(id=number + 1000))
            session.flush()
            loop.model()
            inner.rollback()
        session.get_one(Row, number).step = "after"


def reads_first(loop: Loop, engine: Engine, number: int) -> None:
    with Session(engine) as session:
        session.scalar(select(func.count()).select_from(Row))
        loop.model()
        session.add(Row(id=number, step="after"))
        session.commit()


WRITERS = [adds, inserts, inserts_by_text, inserts_in_a_savepoint]


@pytest.mark.parametrize("task", WRITERS)
def test_tasks_that_write_before_a_model_call_all_end_well(loop: Loop, engine: Engine, task: Any) -> None:
    loop.run(*(partial(task, loop, engine, number) for number in range(TASKS)))
    assert loop.errors == []
    assert rows(engine) == dict.fromkeys(range(TASKS), "after")
    assert set(loop.batches) == {1}


def test_tasks_that_only_read_before_a_model_call_share_its_batches(loop: Loop, engine: Engine) -> None:
    loop.run(*(partial(reads_first, loop, engine, number) for number in range(TASKS)))
    assert loop.errors == []
    assert rows(engine) == dict.fromkeys(range(TASKS), "after")
    assert max(loop.batches) >= 10, "all that the pool has connections for"


def test_tasks_without_a_database_share_batches_with_those_that_wait(loop: Loop, engine: Engine) -> None:
    writers = [partial(adds, loop, engine, number) for number in range(3)]
    loop.run(*writers, *[loop.model] * 5)
    assert loop.batches == [6, 1, 1]


def test_a_task_that_fails_leaves_no_row_and_the_others_stand(loop: Loop, engine: Engine) -> None:
    loop.run(*(partial(adds, loop, engine, number, number % 2 == 1) for number in range(TASKS)))
    assert [error.args for error in loop.errors] == [(number,) for number in range(1, TASKS, 2)]
    assert rows(engine) == dict.fromkeys(range(0, TASKS, 2), "after")


def test_two_engines_on_one_file_are_one_database(loop: Loop, engine: Engine, tmp_path: Path) -> None:
    other = make_engine(tmp_path)
    loop.run(*(partial(adds, loop, (engine, other)[number % 2], number) for number in range(TASKS)))
    assert loop.errors == []
    assert len(rows(engine)) == TASKS


def test_two_databases_do_not_wait_for_each_other(loop: Loop, engine: Engine, tmp_path: Path) -> None:
    other = make_engine(tmp_path / "..")
    Base.metadata.create_all(other)
    loop.run(partial(adds, loop, engine, 1), partial(adds, loop, other, 2))
    assert loop.batches == [2]
    assert (rows(engine), rows(other)) == ({1: "after"}, {2: "after"})
    other.dispose()
    (tmp_path / ".." / "rows.db").unlink()


def kept() -> tuple[int, int]:
    """Databases and gates that something still has. A dialect is in cycles with what is freed before it."""
    for _ in range(5):
        gc.collect()
    return len(sql._by_key), len(turns._gates)


def test_databases_that_tasks_made_for_themselves_are_forgotten(loop: Loop, tmp_path: Path) -> None:
    """In memory, or in a file of its own: a worker that lives for months would keep each, and ask each whose it is."""

    def counts(url: str) -> None:
        engine = create_engine(url)
        with engine.connect() as connection:
            connection.scalar(text("select 1"))
        engine.dispose()

    before = kept()
    for number in range(5):
        loop.run(partial(counts, "sqlite://"), partial(counts, f"sqlite:///{tmp_path / str(number)}"))
    assert loop.errors == []
    databases, gates = kept()
    assert databases <= before[0]
    assert gates <= before[1]


def test_a_task_that_is_over_its_time_while_it_waits_gets_the_error_in_its_statement(
    loop: Loop, engine: Engine
) -> None:
    steps: list[str] = []

    def task() -> None:
        try:
            adds(loop, engine, 1)
        except SoftTimeLimitExceeded:
            steps.append("told")

    loop.start(partial(adds, loop, engine, 0))
    late = loop.start(task)
    assert late.phase is Phase.PARKED
    late.resume(SoftTimeLimitExceeded())
    assert late.dead
    assert steps == ["told"]
    loop.run(partial(adds, loop, engine, 2))
    assert rows(engine) == {0: "after", 2: "after"}


def test_no_time_limit_ends_what_is_written_after_the_tasks_own_code(loop: Loop, engine: Engine) -> None:
    """Celery's own result backend may store results in the same database."""
    loop.start(partial(adds, loop, engine, 0))
    told = job(lambda: None, callback=lambda _: inserts_by_text(loop, engine, 1))
    stores = Fiber(told.run, app="", name="stores", wake=loop.wake)
    stores.resume()
    assert stores.waits_for
    assert stores.phase is Phase.ENDING
    while loop.turn():
        pass
    assert rows(engine) == {0: "after", 1: "after"}


def test_an_error_in_the_middle_lets_the_next_one_go_on_once_it_is_rolled_back(loop: Loop, engine: Engine) -> None:
    def task(number: int) -> None:
        with Session(engine) as session:
            session.add(Row(id=number))
            session.flush()
            session.execute(text("savepoint mine"))
            with pytest.raises(IntegrityError):
                session.connection().execute(insert(Row).values(id=number))
            loop.model()
            session.rollback()
            loop.model()

    loop.run(*(partial(task, number) for number in range(5)))
    assert loop.errors == []
    assert rows(engine) == {}
    assert max(loop.batches) > 1, "after the rollback it holds nobody up"


def test_a_task_that_is_ended_while_others_wait_rolls_back_and_they_go_on(loop: Loop, engine: Engine) -> None:
    first = loop.start(partial(adds, loop, engine, 0))
    second = loop.start(partial(adds, loop, engine, 1))
    third = loop.start(partial(adds, loop, engine, 2))
    assert second.waits_for == third.waits_for == f"database {engine.url.database}"
    loop.parked.remove(first)
    first.terminate()
    second.terminate()
    assert first.dead
    assert second.dead
    while loop.turn():
        pass
    assert third.dead
    assert not turns._lines
    assert rows(engine) == {2: "after"}


def test_rows_that_are_still_to_be_read_hold_up_writers(loop: Loop, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Row), [{"id": number} for number in range(5)])

    def reads() -> None:
        with engine.connect() as connection:
            for number in connection.scalars(select(Row.id)):
                loop.model()
                if number == 3:
                    break
            loop.model()

    loop.run(reads, partial(inserts, loop, engine, 5), reads)
    assert loop.errors == []
    assert rows(engine)[5] == "after"


def test_a_result_still_tells_its_row_count(loop: Loop, engine: Engine) -> None:
    counts: list[int] = []

    def task() -> None:
        with engine.connect() as connection:
            counts.append(connection.execute(select(Row)).rowcount)

    loop.run(task)
    assert counts == [-1]


def test_a_row_that_is_read_for_update_is_locked_on_sqlite_too(loop: Loop, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Row).values(id=1, step=""))

    def counts() -> None:
        with Session(engine) as session:
            row = session.get_one(Row, 1, with_for_update=True)
            row.step += "."
            loop.model()
            session.commit()

    loop.run(*[counts] * 10)
    assert rows(engine) == {1: "." * 10}


def test_readers_that_begin_real_transactions_write_in_turn(loop: Loop, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    Base.metadata.create_all(engine)
    event.listen(engine, "connect", lambda dbapi, _: setattr(dbapi, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    loop.run(*(partial(reads_first, loop, engine, number) for number in range(TASKS)))
    assert loop.errors == []
    assert len(rows(engine)) == TASKS


def test_statements_that_commit_by_themselves_hold_nobody_up(loop: Loop, engine: Engine) -> None:
    by_itself = engine.execution_options(isolation_level="AUTOCOMMIT")
    loop.run(*(partial(inserts, loop, by_itself, number) for number in range(10)))
    assert loop.batches == [10]
    assert rows(engine) == dict.fromkeys(range(10), "after")


@pytest.mark.parametrize("pool", [SingletonThreadPool, StaticPool])
def test_a_transaction_on_the_one_connection_of_all_tasks_lets_none_run(loop: Loop, tmp_path: Path, pool: Any) -> None:
    engine = make_engine(tmp_path, poolclass=pool)
    Base.metadata.create_all(engine)
    loop.run(*(partial(adds, loop, engine, number, number % 2 == 1) for number in range(10)), loop.model)
    assert (loop.alone, loop.batches) == (10, [1])
    assert rows(engine) == dict.fromkeys(range(0, 10, 2), "after")


def test_connections_without_a_pool_have_no_end(loop: Loop, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, poolclass=NullPool)
    Base.metadata.create_all(engine)
    loop.run(*(partial(reads_first, loop, engine, number) for number in range(TASKS)))
    assert loop.batches == [TASKS]


def small(folder: Path, size: int) -> Engine:
    engine = make_engine(folder, poolclass=QueuePool, pool_size=size, max_overflow=0, pool_timeout=PATIENCE)
    Base.metadata.create_all(engine)
    return engine


@pytest.mark.parametrize("task", [reads_first, *WRITERS])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_small_pool_is_shared_in_turn(loop: Loop, tmp_path: Path, size: int, task: Any) -> None:
    engine = small(tmp_path, size)
    loop.run(*(partial(task, loop, engine, number) for number in range(TASKS)))
    assert loop.errors == []
    assert rows(engine) == dict.fromkeys(range(TASKS), "after")


def test_a_task_that_needs_another_connection_finds_one(loop: Loop, tmp_path: Path) -> None:
    engine = small(tmp_path, 5)

    def task(number: int) -> None:
        with engine.connect() as outer:
            outer.execute(select(Row)).all()
            loop.model()
            with engine.begin() as inner:
                inner.execute(insert(Row).values(id=number))

    loop.run(*(partial(task, number) for number in range(TASKS)))
    assert loop.errors == []
    assert len(rows(engine)) == TASKS
    assert max(loop.batches) == 4


def test_a_task_that_alone_needs_more_connections_than_there_are_is_told_so(loop: Loop, tmp_path: Path) -> None:
    engine = small(tmp_path, 1)

    def task() -> None:
        with engine.connect(), engine.connect():
            pass

    loop.run(task)
    assert ["QueuePool limit" in str(error) for error in loop.errors] == [True]


def test_a_scoped_session_is_each_tasks_own_and_closed_with_it(loop: Loop, engine: Engine) -> None:
    session = scoped_session(sessionmaker(engine))
    session()

    def task(number: int) -> None:
        session.add(Row(id=number, step="after"))
        loop.model()
        if number % 2:
            session.rollback()
        session.commit()

    def forgets() -> None:
        session.add(Row(id=1000))
        session.flush()

    loop.run(*(partial(task, number) for number in range(10)), forgets, forgets)
    assert loop.errors == []
    assert loop.batches == [10]
    assert rows(engine) == dict.fromkeys(range(0, 10, 2), "after")
    assert list(session.new) == []


@pytest.mark.parametrize("is_late", [False, True])
def test_a_session_of_all_tasks_lets_none_run_in_its_transaction(loop: Loop, engine: Engine, is_late: bool) -> None:
    """One that a task makes for all is known by the second that uses it."""
    sessions = [] if is_late else [Session(engine)]
    # Those that are there before the first task have a lower number than the one that this module made.
    if sessions:
        sessions[0].hash_key = -1

    def task(number: int) -> None:
        if not sessions:
            sessions.append(Session(engine))
        session = sessions[0]
        session.add(Row(id=number, step="after"))
        loop.model()
        if number % 2:
            session.rollback()
        session.commit()

    loop.run(*(partial(task, number) for number in range(10)))
    assert loop.errors == []
    assert rows(engine) == dict.fromkeys(range(0, 10, 2), "after")
    assert loop.alone == 10 - is_late


def test_a_connection_of_all_tasks_lets_none_run_in_its_transaction(loop: Loop, engine: Engine) -> None:
    connection = engine.connect()

    def task(number: int) -> None:
        connection.execute(insert(Row).values(id=number, step="after"))
        loop.model()
        if number % 2:
            connection.rollback()
        connection.commit()

    loop.run(*(partial(task, number) for number in range(10)))
    assert loop.errors == []
    assert loop.alone == 10
    assert rows(engine) == dict.fromkeys(range(0, 10, 2), "after")


def test_a_task_that_runs_alone_begins_when_no_other_is_in_a_transaction(loop: Loop, engine: Engine) -> None:
    def alone(number: int) -> None:
        with exclusive():
            adds(loop, engine, number)

    loop.start(partial(adds, loop, engine, 0))
    loop.start(partial(alone, 1))
    loop.start(partial(adds, loop, engine, 2), exclusive=True)
    loop.run(partial(adds, loop, engine, 3))
    assert loop.errors == []
    assert rows(engine) == dict.fromkeys(range(4), "after")
    assert loop.alone == 2


def test_two_tasks_that_would_wait_for_each_other_do_not(loop: Loop, engine: Engine, tmp_path: Path) -> None:
    """Where they meet in the database, the database says so: here one of them is told that it is locked."""
    (tmp_path / "other").mkdir()
    other = make_engine(tmp_path / "other")
    Base.metadata.create_all(other)

    def task(number: int, *engines: Engine) -> None:
        with engines[0].begin() as first:
            first.execute(insert(Row).values(id=number))
            loop.model()
            with engines[1].begin() as second:
                second.execute(insert(Row).values(id=number))

    loop.run(partial(task, 1, engine, other), partial(task, 2, other, engine))
    assert ["locked" in str(error) for error in loop.errors] == [True]
    assert len(rows(engine)) + len(rows(other)) >= 2


def test_what_a_task_imports_late_is_watched_from_the_next_one_on(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(sql, "_unwatched", {})

    def imports() -> None:
        sql._unwatched["sqlalchemy"] = lambda: seen.append("watched")
        loop.model()
        assert seen == []

    loop.run(imports, loop.model)
    assert (loop.alone, loop.batches, seen) == (1, [1], ["watched"])


def test_below_an_event_loop_nothing_waits_and_nothing_breaks(loop: Loop, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    Base.metadata.create_all(engine)

    async def coroutine(number: int) -> None:
        adds(loop, engine, number)

    loop.run(*(lambda number=number: asyncio.run(coroutine(number)) for number in range(3)))
    assert loop.errors == []
    assert loop.alone == 3


@pytest.mark.parametrize(
    ("statement", "takes"),
    [
        ("SELECT 1", False),
        ("  select updated_at, is_deleted from row where step = :step", False),
        ("/* a */ -- b\n (SELECT 1) UNION (SELECT 2)", False),
        ("WITH a AS (SELECT 1) SELECT * FROM a", False),
        ("SAVEPOINT sa_savepoint_1", False),
        ("SET LOCAL statement_timeout = 1", False),
        ("SELECT * FROM row FOR UPDATE", True),
        ("SELECT * FROM row FOR KEY SHARE", True),
        ("SELECT * FROM row LOCK IN SHARE MODE", True),
        ("SELECT pg_advisory_xact_lock(1)", True),
        ("SELECT * INTO copy FROM row", True),
        ("WITH a AS (DELETE FROM row RETURNING id) SELECT * FROM a", True),
        ("INSERT INTO row VALUES (1)", True),
        ("update row set step = 1", True),
        ("CREATE TABLE a (b int)", True),
        ("CALL something()", True),
        ("LOCK TABLE row", True),
    ],
)
def test_a_statement_takes_locks_or_does_not(statement: str, takes: bool) -> None:
    assert locks.takes_locks(statement) is takes


def test_outside_tasks_nothing_is_different(loop: Loop, engine: Engine) -> None:
    session = scoped_session(sessionmaker(engine))
    assert session() is session()
    session.add(Row(id=1, step="after"))
    session.commit()
    session.remove()
    assert not session.registry.has()
    assert rows(engine) == {1: "after"}
    assert sqlalchemy.inspect(engine).has_table("row")
