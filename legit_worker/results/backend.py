"""A Redis result backend whose results are stored in groups.

In: what Celery stores of a task, from its fiber. Out: the same keys, values and messages as Celery's own backend, which
reach the server together with other tasks' ones while the fiber is parked. A caller that can't park stores as Celery
does.

Sources: celery.backends.base and celery.backends.redis (5.5 to 5.7).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextvars import ContextVar
from traceback import walk_tb
from typing import Any

from celery import Celery, states
from celery.backends.base import BaseKeyValueStoreBackend
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry

from legit_worker import parking
from legit_worker.results import blocks, patience
from legit_worker.results.chords import Claims
from legit_worker.results.described import StandIn, stand_in_for
from legit_worker.results.writer import Writer
from legit_worker.results.writes import Rider, Write, is_away, send

#: Seconds that the server has to answer, if the project sets more: Celery sets 120.
PATIENCE = 10.0

#: Celery's own methods of storing. A class that overrides one of them stores in its own way.
CELERYS = {
    **dict.fromkeys(("_store_result", "_get_task_meta_for"), BaseKeyValueStoreBackend),
    **dict.fromkeys(("set", "_set", "get"), RedisBackend),
}

#: The state that Celery stores now, if its write goes into a group.
_storing: ContextVar[str | None] = ContextVar("legit_worker_storing", default=None)

#: What goes to the server together with the result that Celery stores now.
riders: ContextVar[Sequence[Rider]] = ContextVar("legit_worker_riders", default=())

#: The writers of this process.
writers: list[Writer] = []


def away_since() -> float | None:
    """Return since when a server takes no results, by the monotonic clock; None if all take them."""
    since = [writer.away_since for writer in writers if writer.away_since is not None]
    return min([*since, *list(patience.waiting_since.values())], default=None)


def is_refused(error: BaseException | None) -> bool:
    """Whether a server of results refuses for good what Celery stores or counts there for one task.

    Celery raises some of these errors anew.
    """
    while error is not None:
        if isinstance(error, patience.RefusedStateError):
            return True
        if isinstance(error, ResponseError | BackendStoreError) and not is_away(error) and _came_through_here(error):
            return True
        error = error.__cause__
    return False


def _came_through_here(error: BaseException) -> bool:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    mine = (module for module in modules if module != patience.__name__)  # which calls any backend
    return any(module.startswith("legit_worker.results.") for module in mine)


def ask_early(app: Celery) -> None:
    """Have the server of results asked now, on the writer's thread. If it takes nothing, the log tells it at once.

    It is asked for a result's key, as before each result: a user may have the right to that, and not to PING.
    """
    backend: Any = app.backend
    if isinstance(backend, Groups):
        backend.ask_early()


def store_in_groups(app: Celery) -> None:
    """Let this app's backends store in groups, in a process whose tasks can park."""
    get_backend = app._get_backend

    def get_grouping_backend() -> Any:
        return _grouping(get_backend())

    app._get_backend = get_grouping_backend
    if app._backend is not None:
        _grouping(app._backend)


def _grouping(backend: Any) -> Any:
    if _stores_as_celery(type(backend)):
        kind: Any = type(backend)
        backend.__class__ = _grouped(kind)
    return backend


def _stores_as_celery(kind: type) -> bool:
    if not issubclass(kind, RedisBackend) or issubclass(kind, Groups):
        return False
    kinds = [one for one in kind.__mro__ if one is not RidersOnRedis]
    return all(next(one for one in kinds if name in vars(one)) is celerys for name, celerys in CELERYS.items())


@functools.cache
def _grouped(wrapped: Any) -> Any:
    return type(wrapped.__name__, (Groups, wrapped), {"wrapped": wrapped})


class RidersOnRedis:
    """Mixed into a Redis backend. The riders go to the server together with the result."""

    client: Any
    expires: int | None

    def _set(self, key: bytes, value: bytes | str, *expires: int | None) -> None:
        """Store a result. Celery calls this again if it raises that Redis did not answer."""
        write = _write(self, key, value, *expires)
        if not write.riders:
            super()._set(key, value, *expires)  # type: ignore[misc]
            return
        error = send(self.client, [write])
        if not write.is_stored:
            raise write.error or error or AssertionError("a server has answered, and not about the result")


class Groups(Claims):
    """Mixed into a Redis backend's class. Called on the tasks' thread."""

    wrapped: Any
    connparams: dict[str, Any]
    as_uri: Any
    decode: Any
    get_key_for_task: Any
    _create_client: Any

    def __reduce__(self, *args: Any) -> Any:
        reduced: Any = super().__reduce__(*args)
        function, (kind, *rest) = reduced
        return function, (self.wrapped if kind is type(self) else kind, *rest)

    def _store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Store as the wrapped backend does. If the caller can park, only `_set` differs."""
        if not parking.is_around_task():
            return super()._store_result(task_id, result, state, *args, **kwargs)  # type: ignore[misc]
        token = _storing.set(state)
        try:
            return super()._store_result(task_id, result, state, *args, **kwargs)  # type: ignore[misc]
        except BaseException as error:
            if error.__traceback__ is not None:  # a task's failure shows Celery's frames alone
                error.__traceback__ = error.__traceback__.tb_next
            raise
        finally:
            _storing.reset(token)

    def _get_result_meta(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is stored of a task in this state."""
        if self._stand_in is None:
            return super()._get_result_meta(*args, **kwargs)  # type: ignore[misc]
        return self._stand_in.describe(*args, **kwargs)

    @functools.cached_property
    def _stand_in(self) -> StandIn | None:
        return stand_in_for(self, self.wrapped)

    def _get_task_meta_for(self, task_id: str) -> Any:
        """Return what is stored of a task. The writer looks itself."""
        if _storing.get() is not None:
            return {"status": states.PENDING, "result": None}
        return super()._get_task_meta_for(task_id)  # type: ignore[misc]

    def get(self, key: bytes) -> Any:
        """Return the value of a key."""
        if not parking.is_around_task():
            return super().get(key)  # type: ignore[misc]
        read = Write(key=key, is_read=True)
        self._writer.store(read)
        return read.value

    def _set(self, key: bytes, value: bytes | str, *expires: int | None) -> None:
        """Store a result, in the next group if the caller can park."""
        state = _storing.get()
        if state is None:
            super()._set(key, value, *expires)  # type: ignore[misc]
            return
        write = _write(self, key, value, *expires, is_success=state == states.SUCCESS)
        # The next attempt of a retried task must not begin before Celery has told of this one.
        self._writer.store(write, waits=state != states.RETRY)

    def ask_early(self) -> None:
        """See `ask_early` above."""
        self._writer.store(Write(key=self.get_key_for_task("legit_worker"), is_read=True), waits=False)

    def ensure(self, fun: Any, args: tuple[Any, ...], **policy: Any) -> Any:
        """Call what may fail while the server is away. The writer itself tries again."""
        if _storing.get() is None or self.wrapped.ensure is not RedisBackend.ensure:
            return super().ensure(fun, args, **policy)  # type: ignore[misc]
        return fun(*args)

    @functools.cached_property
    def _writer(self) -> Writer:
        writer = Writer(self.as_uri(), self._connect, self._is_success)
        writers.append(writer)
        return writer

    def _connect(self) -> Any:
        """Return a client of the writer's own, which never tries again by itself."""
        given = self.connparams.get("socket_timeout")
        own = {"socket_timeout": min(given or PATIENCE, PATIENCE), "retry": Retry(NoBackoff(), 0)}
        client = self._create_client(**self.connparams | own)
        pool = client.connection_pool
        pool.connection_class = blocks.sending_blocks(pool.connection_class)
        return client

    def _is_success(self, payload: bytes | str) -> bool:
        return bool(self.decode(payload)["status"] == states.SUCCESS)


def _write(
    backend: Any, key: bytes, value: bytes | str, expires: int | None = None, *, is_success: bool = False
) -> Write:
    """Return what Celery would store. Before 5.7 it gives no `expires` here."""
    return Write(
        key=key,
        value=value,
        is_success=is_success,
        expires=backend.expires if expires is None else expires,
        riders=[rider for rider in riders.get() if rider.is_open],
    )
