"""The project with tasks that have a SQLAlchemy transaction open across a model call.

In: `PROJECT_DATABASE`, the database's URL. Out: rows, `before` a model call and `after` it.
"""

from __future__ import annotations

import os

from project import app
from sqlalchemy import create_engine, func, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

import legit_worker

__all__ = ["app"]

engine = create_engine(os.environ["PROJECT_DATABASE"])


class Base(DeclarativeBase):
    """The tables."""


class Row(Base):
    """One task's."""

    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(unique=True)
    step: Mapped[str] = mapped_column(default="before")


class Counter(Base):
    """One row that all tasks change."""

    __tablename__ = "counter"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


#: The ways in which tasks come to a session: one each, one per thread, one for all.
Own = sessionmaker(engine)
Scoped = scoped_session(Own)
of_all = Session(engine)


def call_model(item: str) -> None:
    """The tasks' model."""
    legit_worker.model("sim").map([item])


def write(session: Session | scoped_session[Session], item: str, fails: bool) -> None:
    """Add, flush, encode, commit."""
    row = Row(item=item)
    session.add(row)
    session.flush()
    call_model(item)
    row.step = "after"
    if fails:
        raise ValueError(f"{item} fails")
    session.commit()


@app.task(name="adds")
def adds(item: str, fails: bool) -> None:
    """By a session of its own."""
    with Own() as session:
        write(session, item, fails)


@app.task(name="adds_scoped")
def adds_scoped(item: str, fails: bool) -> None:
    """By the thread's session."""
    try:
        write(Scoped, item, fails)
    finally:
        Scoped.remove()


@app.task(name="adds_by_one_session")
def adds_by_one_session(item: str, fails: bool) -> None:
    """By the session of all tasks."""
    try:
        write(of_all, item, fails)
    except ValueError:
        of_all.rollback()
        raise


@app.task(name="inserts")
def inserts(item: str, fails: bool) -> None:
    """The same in Core."""
    with engine.begin() as connection:
        connection.execute(insert(Row).values(item=item, step="before"))
        call_model(item)
        connection.execute(update(Row).where(Row.item == item).values(step="after"))
        if fails:
            raise ValueError(f"{item} fails")


@app.task(name="reads_and_writes")
def reads_and_writes(item: str, fails: bool) -> None:
    """Read, encode, write, commit."""
    with Own() as session:
        session.scalar(select(func.count()).select_from(Row))
        call_model(item)
        session.add(Row(item=item, step="after"))
        session.flush()
        if fails:
            raise ValueError(f"{item} fails")
        session.commit()


@app.task(name="counts")
def counts(item: str, fails: bool) -> None:
    """Changes the row that all tasks change, and has it locked across a model call."""
    with Own() as session:
        counter = session.get_one(Counter, 1, with_for_update=True)
        counter.value += 1
        session.add(Row(item=item, step="after"))
        call_model(item)
        if fails:
            raise ValueError(f"{item} fails")
        session.commit()
