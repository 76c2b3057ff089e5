"""The result backend that routes: the project's own backend, and one envelope for each finished task.

In: Celery's calls when a task ends. Out: the stock result, and the envelope on the app's queue, both before Celery
acks the task's message.

Sources: celery.backends.base.Backend, celery.backends.redis and celery.app.trace (5.5 to 5.7). Whenever a task ends,
Celery calls `mark_as_done`, `mark_as_failure`, `mark_as_revoked` or `chord_error_from_stack`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from time import monotonic, time
from typing import Any

from celery import Celery, signals
from celery._state import get_current_task
from celery.app.backends import by_url
from celery.app.task import Context
from celery.backends.base import BaseKeyValueStoreBackend
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.exceptions import NotRegistered, TaskRevokedError, TimeLimitExceeded

from legit_worker import settings
from legit_worker.apps import carrier, header
from legit_worker.models import handle
from legit_worker.results.backend import RidersOnRedis, riders
from legit_worker.results.writes import Rider
from legit_worker.routing.delivery import Delivery
from legit_worker.routing.endings import GOES_ON, Request, app_of, destination, endings, never_run
from legit_worker.routing.envelope import Ending, seal
from legit_worker.routing.lanes import lanes_of
from legit_worker.routing.wires import commands, connect, is_redis
from legit_worker.tracing import traceparent

logger = logging.getLogger(__name__)

#: Seconds within which Celery may mark the same hard time limit again.
TOLD_AGAIN = 10.0


class RoutingBackend:
    """The class in a `result_backend` URL: `legit_worker.routing:RoutingBackend+redis://localhost/0`.

    Its instance is of a subclass of the wrapped backend. So it has every method of that backend, and it sees the calls
    that the backend makes to itself for chords and chains.
    """

    def __new__(cls, app: Celery, url: str | None = None, **options: Any) -> Any:
        wrapped, inner = by_url(url, app.loader)
        return (routing(wrapped) if _any_app_routes() else wrapped)(app=app, url=inner, **options)


def route_results(app: Celery) -> None:
    """Let every backend of this Celery app route, if the settings route any app's results."""

    def get_backend() -> Any:
        wrapped, url = by_url(app.backend_cls or app.conf.result_backend, app.loader)
        is_bare = wrapped is not RoutingBackend
        return (routing(wrapped) if is_bare and _any_app_routes() else wrapped)(app=app, url=url)

    # The only function of Celery that sees every spelling of the setting, whenever the project sets it.
    app._get_backend = get_backend


def _any_app_routes() -> bool:
    """If no app routes, the backend is the stock one: not even a traceback shows a frame of this module."""
    return any(chosen.result_routing for chosen in settings.load(enabled_by_default=True).apps.values())


@functools.cache
def routing(wrapped: Any) -> Any:
    """Return a subclass of the wrapped backend that routes: always the same one for one backend."""
    mixins = (JoinsRedis, Routing) if issubclass(wrapped, RedisBackend) else (Routing,)
    return type(f"Routing{wrapped.__name__}", (*mixins, wrapped), {"wrapped": wrapped})


def _unpickled(wrapped: Any, function: Callable[..., Any], *rest: Any) -> Any:
    return function(routing(wrapped), *rest)


#: The run of a task that began here last, and when it began, in seconds since the epoch. Celery may tell the end with
#: another object of the request, or tell the end of a task that never ran.
_begun: ContextVar[tuple[tuple[str, Any], float] | None] = ContextVar("legit_worker_begun", default=None)

#: The run of a task whose end the app has been told.
_told: ContextVar[tuple[str, Any] | None] = ContextVar("legit_worker_told", default=None)

#: The request of the chord's part that Celery counts now: the chord's body has the same app.
_part: ContextVar[Request | None] = ContextVar("legit_worker_part", default=None)


class Routing:
    """Mixed into a backend's class. Any thread may call it."""

    wrapped: Any
    app: Celery

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._chosen = settings.with_bounds(settings.load(enabled_by_default=True))
        # Celery makes one backend for each thread.
        self.lanes = lanes_of(self.app)
        self._timed_out: dict[str, float] = {}
        _connect_signals()

    def __reduce__(self, *args: Any) -> Any:
        reduced: Any = super().__reduce__(*args)
        function, (_, *rest) = reduced
        return _unpickled, (self.wrapped, function, *rest)

    def report(self) -> dict[str, Any]:
        """Return the figures for `inspect stats`."""
        return self.lanes.report()

    def mark_as_done(self, task_id: str, result: Any, request: Any = None, *rest: Any, **options: Any) -> Any:
        """Store as the wrapped backend does, and route."""
        stock = partial(super().mark_as_done, task_id, result, request, *rest, **options)  # type: ignore[misc]
        ended = list(self._ended(task_id, request, "SUCCESS", result))
        if ended and self.app.conf.worker_deduplicate_successful_tasks:
            self._check_storable(result, request)
        return self._route(stock, ended, request, is_last=False)

    def mark_as_failure(
        self, task_id: str, exc: Any, traceback: Any = None, request: Any = None, *rest: Any, **options: Any
    ) -> Any:
        """Store as the wrapped backend does, and route."""
        stock = partial(super().mark_as_failure, task_id, exc, traceback, request, *rest, **options)  # type: ignore[misc]
        is_told = self._is_told_again(task_id, exc) or _told.get() == _run(task_id, request)
        ended = () if is_told else self._ended(task_id, request, "FAILURE", exc)
        return self._route(stock, ended, request)

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, *rest: Any, **options: Any) -> Any:
        """Store as the wrapped backend does, and route."""
        stock = partial(super().mark_as_revoked, task_id, reason, request, *rest, **options)  # type: ignore[misc]
        return self._route(
            stock, self._ended(task_id, request, "REVOKED", TaskRevokedError(reason or "revoked")), request
        )

    def on_chord_part_return(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Do as the wrapped backend does, and remember the part's request in case the chord fails here."""
        token = _part.set(_as_mapping(request))
        try:
            return super().on_chord_part_return(request, *args, **kwargs)  # type: ignore[misc]
        finally:
            _part.reset(token)

    def chord_error_from_stack(self, callback: Any, exc: Any = None) -> Any:
        """Do as the wrapped backend does, and route a failure for the chord's body, which never runs."""
        error = sys.exc_info()[1] if exc is None else exc
        cause = _part.get() or {}
        app = self._routed_app(callback.get("options", {}).get("headers") or {}) or self._routed_app(cause)
        ended = list(never_run(app, callback, cause, "FAILURE", error)) if app else []
        stock = partial(super().chord_error_from_stack, callback, exc)  # type: ignore[misc]
        return self._route(stock, ended, cause)

    def unknown_task(self, request: Request, task_id: str, name: str) -> None:
        """Route a failure for a message whose task this worker does not have. Celery has stored the stock result."""
        app = self._routed_app(request)
        ended = endings(app, task_id, {**request, "task": name}, "FAILURE", NotRegistered(name)) if app else ()
        for delivery in self._deliveries(ended, request):
            self.lanes.send(delivery)

    def hand_on(self, request: Request, headers: dict[str, Any]) -> None:
        """Give a sent task's headers the app and `meta` of this request, if its results are routed."""
        app = self._routed_app(request)
        if app is None:
            return
        headers.setdefault(carrier(self._chosen), app)
        # A retry has the same id, and so does a replacement: both are the same task.
        same = headers.get("id") == request.get("id")
        for name in ("meta", "route", "queued_at", "traceparent") if same else ("meta",):
            if (value := header(name, request)) is not None:
                headers.setdefault(name, value)

    def _is_told_again(self, task_id: str, exc: Any) -> bool:
        """Tell whether Celery marks a hard time limit again: prefork does so when the task's process is gone."""
        if not isinstance(exc, TimeLimitExceeded):
            return False
        now = monotonic()
        self._timed_out = {key: when for key, when in self._timed_out.items() if now - when < TOLD_AGAIN}
        return self._timed_out.setdefault(task_id, now) != now

    def _ended(self, task_id: str, request: Any, status: Any, value: Any) -> Iterable[Ending]:
        mapping = _as_mapping(request) or {}
        app = self._routed_app(mapping)
        if app is None:
            self._count_unknown(mapping)
            return ()
        run, started_at = _begun.get() or (None, None)
        if run != _run(task_id, mapping):
            return endings(app, task_id, mapping, status, value)
        return endings(
            *(app, task_id, mapping, status, value),
            started_at=started_at,
            model=handle.last_called.get(),
            computed_by=handle.last_computed.get(),
            traceparent=traceparent(),
        )

    def _routed_app(self, request: Request) -> str | None:
        """Return the app that the request names, if its results are routed."""
        name = app_of(self._chosen, request)
        return name if name in self._chosen.apps and self._chosen.apps[name].result_routing else None

    def _count_unknown(self, request: Request) -> None:
        name = app_of(self._chosen, request)
        if name is None or name in self._chosen.apps:
            return
        if self.lanes.count_unknown(name):
            logger.warning("results of app %.128r are not routed: no LEGIT_WORKER_APPS__<APP>__… names it", name)

    def _check_storable(self, result: Any, request: Any) -> None:
        """Raise the wrapped backend's error over a result that its serializer refuses.

        With deduplication the app is told first. It must not hear of a success that then becomes a failure.
        """
        ignores = (_as_mapping(request) or {}).get("ignore_result")
        if isinstance(self, BaseKeyValueStoreBackend) and not ignores:
            self.encode(self.encode_result(result, "SUCCESS"))

    def _route(self, stock: Callable[[], Any], ended: Iterable[Ending], request: Any, *, is_last: bool = True) -> Any:
        """Store the stock result and send the envelopes, in one step if both are on one Redis.

        If the result can't be stored, Celery makes a failure of a success. No other end follows if it `is_last`.
        """
        deliveries = list(self._deliveries(ended, _as_mapping(request) or {}))
        if not deliveries:
            return stock()
        # With deduplication, a task that has a result does not run again. So its envelope must be sent first.
        if self.app.conf.worker_deduplicate_successful_tasks:
            self._send(deliveries, request)
            return stock()
        left = list(deliveries)
        try:
            with self._joining(deliveries, left):
                returned = stock()
        except Exception:
            if is_last:
                self._send(left, request)
            raise
        finally:
            if len(left) < len(deliveries):
                self._note_told(deliveries, request)
        self._send(left, request)
        return returned

    def _send(self, deliveries: Sequence[Delivery], request: Any) -> None:
        self._note_told(deliveries, request)
        for delivery in deliveries:
            self.lanes.send(delivery)

    @staticmethod
    def _note_told(deliveries: Sequence[Delivery], request: Any) -> None:
        """Remember that this run's end is told: what goes wrong afterwards is no second end."""
        if deliveries:
            _told.set(_run(deliveries[0].task_id, request))

    def _deliveries(self, ended: Iterable[Ending], request: Request) -> Iterator[Delivery]:
        for ending in ended:
            chosen = self._chosen.apps[ending.app]
            limit = self._chosen.result_max_bytes.of(0)
            self.lanes.count(ending.app, "sent")
            if ending.status == "FAILURE":
                self.lanes.count(ending.app, "failed")
            yield Delivery(
                app=ending.app,
                chosen=chosen,
                queue=destination(ending.app, self._chosen, request),
                task_id=ending.id,
                envelope=seal(ending, encoding=chosen.encoding, max_bytes=limit),
                deadline=monotonic() + self._chosen.result_retry_seconds,
            )

    @contextmanager
    def _joining(self, deliveries: Sequence[Delivery], left: list[Delivery]) -> Iterator[None]:
        """Let deliveries ride with the result if both are for one server. Those that arrive are taken out of `left`."""
        riding = [
            (one, Rider(commands(one.pushes())))
            for one in deliveries
            if not one.bound and self._is_same_server(one.chosen.url)
        ]
        token = riders.set([rider for _, rider in riding])
        try:
            yield
        finally:
            riders.reset(token)
            for delivery, rider in riding:
                if rider.is_done:
                    left.remove(delivery)

    def _is_same_server(self, url: str | None) -> bool:
        return False


class JoinsRedis(RidersOnRedis):
    """Mixed in if the wrapped backend is Redis: envelopes for the same server go there together with the result."""

    app: Celery
    connparams: dict[str, Any]

    def _is_same_server(self, url: str | None) -> bool:
        if url not in self._same:
            self._same[url] = self._compare(url)
        return self._same[url]

    @functools.cached_property
    def _same(self) -> dict[str | None, bool]:
        return {}

    def _compare(self, url: str | None) -> bool:
        if isinstance(self, SentinelBackend):
            return False
        connection = connect(self.app, url)
        if not is_redis(connection) or connection.as_uri().startswith("sentinel"):
            return False
        try:
            theirs = self._params_from_url(connection.as_uri(include_password=True), {"db": 0})  # type: ignore[attr-defined]
        except (KeyError, ValueError):
            return False
        return _address(theirs) == _address(self.connparams)


def _address(params: Mapping[str, Any]) -> tuple[Any, ...]:
    if params.get("path"):
        return params["path"], int(params.get("db") or 0)
    return params.get("host") or "localhost", int(params.get("port") or 6379), int(params.get("db") or 0)


def _as_mapping(request: Any) -> dict[str, Any] | None:
    """Return Celery's request as a dictionary. None if Celery made one up that has no headers."""
    return vars(request) if isinstance(request, Context) else request if isinstance(request, dict) else None


def _connect_signals() -> None:
    """Connect once per process, for any number of backends."""
    signals.task_prerun.connect(_remember_start, dispatch_uid="legit_worker.routing")
    signals.before_task_publish.connect(_inherit, dispatch_uid="legit_worker.routing")
    signals.task_unknown.connect(_route_unknown, dispatch_uid="legit_worker.routing")
    signals.worker_ready.connect(_warn_of_early_acks, dispatch_uid="legit_worker.routing")


def _run(task_id: str, request: Any) -> tuple[str, Any]:
    """Tell one run of a task from another."""
    return task_id, (_as_mapping(request) or {}).get("retries")


def _remember_start(task: Any = None, **_: Any) -> None:
    if task.request.is_eager:  # a part of the task that calls it
        return
    _told.set(None)
    _begun.set((_run(task.request.id, task.request), time()))
    setattr(task.request, GOES_ON, bool(task.request.chain))
    handle.forget_calls()


def _inherit(headers: dict[str, Any] | None = None, **_: Any) -> None:
    parent = get_current_task()
    if parent is None or headers is None:
        return
    backend = parent.app.backend
    request = _as_mapping(parent.request)
    if isinstance(backend, Routing) and request:
        backend.hand_on(request, headers)


def _route_unknown(sender: Any, message: Any, name: str, id: str, **_: Any) -> None:
    backend = sender.app.backend
    if isinstance(backend, Routing):
        request = {**message.headers, "delivery_info": message.delivery_info, "hostname": sender.hostname}
        request["reply_to"] = message.properties.get("reply_to")
        try:
            payload = message.payload
        except Exception:  # a decoder may raise anything; then no argument names the app
            payload = None
        if isinstance(payload, dict):  # protocol 1
            request |= payload
        elif isinstance(payload, list | tuple) and len(payload) == 3:
            request |= {"kwargs": payload[1], **(payload[2] or {})}
        backend.unknown_task(request, id, name)


def _warn_of_early_acks(sender: Any, **_: Any) -> None:
    app = sender.app
    if isinstance(app.backend, Routing) and not app.conf.task_acks_late:
        logger.warning(
            "task_acks_late is off: a killed worker can lose a task that it has acked early, and that task's routed "
            "result. Set task_acks_late = True to get each result at least once."
        )
