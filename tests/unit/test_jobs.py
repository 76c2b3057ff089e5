"""Tasks that must not begin by now, and a retry that can't be sent since the broker is away."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import celery
import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.exceptions import Reject
from celery.worker import state
from jobs import job
from kombu.exceptions import EncodeError, OperationalError

from legit_worker.pool.adoption import Adoption
from legit_worker.pool.entrance import Entrance
from legit_worker.pool.fibers import Fiber
from legit_worker.pool.jobs import CLOSED, STORES_NOTHING, _seen_to
from legit_worker.pool.running import Running
from legit_worker.pool.strays import Strays
from legit_worker.settings import Settings


class Request:
    """Celery's, of a message by RabbitMQ."""

    id, expires = "a", None
    request_dict: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *, is_connected: bool = True, stamps: tuple[str, ...] = ()) -> None:
        self.message = SimpleNamespace(delivery_tag=1, channel=SimpleNamespace(connection=is_connected or None))
        self.stamped_headers = stamps

    def revoked(self) -> bool:
        """As Celery's."""
        return self.id in state.revoked or "gone" in self.stamped_headers

    def on_success(self, result: Any) -> None:
        """Note nothing."""


class Failing(Request):
    """Celery's in a shutdown: acks or rejects, and then stores; Celery 5.6 does not once the shutdown has begun."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    store_errors, _context = True, None

    def __init__(self, ends_by: str = "ack") -> None:
        super().__init__()
        self.order: list[str] = []
        self._ends_by = f"_on_{ends_by}"
        self._on_ack, self._on_reject = lambda: self.order.append("ack"), lambda: self.order.append("reject")
        self.task = SimpleNamespace(backend=self)

    def mark_as_failure(self, *_: Any, **__: Any) -> None:
        """The backend's."""
        self.order.append("store")

    def on_failure(self, failure: ExceptionInfo) -> None:
        """As Celery's."""
        getattr(self, self._ends_by)()
        if not state.should_terminate or celery.VERSION[:2] < STORES_NOTHING:
            self.mark_as_failure()


def ran(request: Request) -> bool:
    """Whether its task's own code ran."""
    seen: list[int] = []
    fiber = Fiber(job(seen.append, 1, callback=request.on_success).run, app="", name="a", request=request)
    fiber.resume()
    assert fiber.dead
    return bool(seen)


def test_a_task_whose_connection_is_gone_does_not_begin() -> None:
    """Its message comes again. Celery 5.6 begins tasks with an ETA nevertheless."""
    assert ran(Request())
    assert not ran(Request(is_connected=False))


def test_a_task_that_was_revoked_while_it_waited_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "revoked_stamps", {"tenant": ["gone"]})
    assert ran(Request(stamps=("kept",)))
    assert not ran(Request(stamps=("gone",)))
    monkeypatch.setattr(state, "revoked", {"a"})
    assert not ran(Request())


def test_a_task_that_must_be_refused_is_not_if_its_connection_is_gone() -> None:
    """Its message comes again, and is refused then."""
    entrance = Entrance(
        *(Celery(set_as_current=False), Settings(), {}), wake=lambda fiber: None, is_inline=False, strays=Strays(0)
    )
    request = Failing()
    one = job(print, error_callback=request.on_failure, callback=request.on_success)
    request.message = SimpleNamespace(
        delivery_tag=1, channel=SimpleNamespace(connection=None), delivery_info={}, headers={}
    )
    entrance.fiber(one, "soon", None, lambda *_: None).resume()
    assert request.order == []
    request.message.channel.connection = object()
    entrance.fiber(one, "soon", None, lambda *_: None).resume()
    assert request.order == ["store", "ack"]


@pytest.mark.parametrize(
    ("task_id", "args", "kwargs", "said"),
    [
        ("an-id", [], [], r"kwargs must be an object, got list: send \{\} if there are none"),
        ("an-id", [], None, "kwargs must be an object, got NoneType"),
        ("an-id", {"text": "red"}, {}, "args must be a list, got dict: send arguments that have names as kwargs"),
        ("an-id", "red", {}, "args must be a list, got str"),
        ("an-id", None, {}, "args must be a list, got NoneType"),
        (4711, [], {}, "id is 4711: send a text that is not empty"),
        (None, [], {}, "id is None: send a text"),
        ("", [], {}, "id is '': send a text"),
    ],
)
def test_a_message_that_calls_no_task_fails_with_what_is_wrong_with_it(
    task_id: Any, args: Any, kwargs: Any, said: str
) -> None:
    """PHP writes `[]` for an array without entries, whatever it stands for."""
    entrance = Entrance(
        *(Celery(set_as_current=False), Settings(), {}), wake=lambda fiber: None, is_inline=False, strays=Strays(0)
    )
    failures: list[ExceptionInfo] = []
    request: Any = Failing()
    request.message.delivery_info = request.message.headers = {}
    one = job(
        print,
        *("a_task", task_id, {"args": args, "kwargs": kwargs}),
        error_callback=failures.append,
        callback=request.on_success,
    )
    entrance.fiber(one, None, None, lambda *_: None).resume()
    (failure,) = failures
    assert re.match(f"the message's {said}", str(failure.exception.exc))


@pytest.mark.parametrize("ends_by", ["ack", "reject"])
@pytest.mark.parametrize("should_terminate", [None, True, 0])
def test_a_failure_is_stored_once_and_then_acked_or_rejected(
    monkeypatch: pytest.MonkeyPatch, should_terminate: int | None, ends_by: str
) -> None:
    """Celery's own worker for tests ends by 0, which Celery takes for no shutdown here."""
    monkeypatch.setattr(state, "should_terminate", should_terminate)
    request = Failing(ends_by)
    job(print, error_callback=request.on_failure, callback=request.on_success).fail(ValueError("no"))
    assert request.order == ["store", ends_by]


class Looking(Failing):
    """Celery's for a lost worker: looks whether a success is stored, ends its message, and stores the failure."""

    acknowledged = False

    def __init__(self, waits_in: str, ends_by: str, adoption: Adoption) -> None:
        """`waits_in` is the step in which its message comes again."""
        super().__init__(ends_by)
        self._waits_in, self._adoption = waits_in, adoption
        self._on_ack = self._on_reject = lambda: self.order.append("the old one ends")

    def on_failure(self, failure: ExceptionInfo) -> None:
        state.task_ready(self)
        self._step("look")
        getattr(self, self._ends_by)()
        self.acknowledged = True
        self._step("store")

    def _step(self, name: str) -> None:
        if name == self._waits_in:
            ends = {f"{end}_log_error": partial(self.order.append, end) for end in ("ack", "reject")}
            message = SimpleNamespace(**ends)
            self._adoption._replace(self, message)  # type: ignore[arg-type]
        self.order.append(name)


@pytest.mark.parametrize("ends_by", ["ack", "reject"])
@pytest.mark.parametrize("waits_in", ["look", "store"])
def test_a_failure_whose_message_comes_again_is_ended_once_it_is_stored_by_the_new_delivery(
    waits_in: str, ends_by: str
) -> None:
    adoption = Adoption(Running(), SimpleNamespace(adopted=lambda *_, **__: None))  # type: ignore[arg-type]
    adoption._call_soon = lambda end, *_: end()
    request = Looking(waits_in, ends_by, adoption)
    job(print, error_callback=request.on_failure, callback=request.on_success).fail(ValueError("no"))
    assert request.order == ["look", "store", ends_by]
    assert request not in state.reserved_requests, "it has ended for Celery"
    assert request.id not in state.requests


@pytest.mark.parametrize(
    ("error", "goes_back"),
    [
        (OperationalError("gone"), True),
        (AttributeError(CLOSED), True),
        (AttributeError("'Thing' object has no attribute 'client'"), False),
        (EncodeError("no JSON"), False),
    ],
)
def test_a_retry_goes_back_if_the_broker_is_away_and_only_then(
    monkeypatch: pytest.MonkeyPatch, error: Exception, goes_back: bool
) -> None:
    app = Celery(set_as_current=False)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(app, "send_task", fail)

    @app.task(bind=True)
    def again(self: Any) -> None:
        raise self.retry(countdown=0)

    again.push_request(called_directly=False, is_eager=False, retries=0, args=(), kwargs={}, delivery_info={})
    with pytest.raises(Reject) as caught:
        again.run()
    try:
        raise caught.value
    except Reject:
        _seen_to((1, ExceptionInfo(), None))
    assert caught.value.requeue is goes_back
