"""Which tasks end when Celery says that one has ended, and what each app is told. Pure.

In: a task's request and its outcome, or the signature of a task that will never run. Out: the endings to route.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from time import time
from typing import Any, Literal

from legit_worker.apps import answer_queue, header, identify
from legit_worker.routing.envelope import Ending
from legit_worker.routing.formats import queue_of
from legit_worker.settings import Settings
from legit_worker.tracing import checked

#: Celery's own housekeeping tasks: nobody waits for their results.
INTERNAL = ("celery.chord_unlock", "celery.backend_cleanup", "celery.accumulate")

#: The request's attribute that tells whether its chain had a next step. Celery 5.5 takes the next step out of the chain
#: before it marks this one as done, so the last step but one would look like the last.
GOES_ON = "legit_worker_goes_on"

Request = Mapping[str, Any]
Status = Literal["SUCCESS", "FAILURE", "REVOKED"]


def endings(
    app: str,
    task_id: str,
    request: Request,
    status: Status,
    value: Any,
    *,
    started_at: float | None = None,
    model: str | None = None,
    computed_by: Mapping[str, Any] | None = None,
    traceparent: str | None = None,
) -> Iterator[Ending]:
    """Return the endings that this task's end causes: its own, and if its chain stops here, the chain's.

    `value` is the task's result, or its error. `started_at` is in seconds since the epoch.
    """
    if request.get("is_eager") or request.get("called_directly") or request.get("task") in INTERNAL:
        return
    if task_id in (None, ""):  # the app could not tell which task that was
        return
    route = header("route", request)
    chain = request.get("chain")
    is_inner = bool(chain or request.get(GOES_ON) or request.get("chord"))
    if route == "always" or (route != "never" and not is_inner):
        own = _ending(app, task_id, request, status, value)
        own = replace(own, started_at=started_at, model=model, computed_by=computed_by)
        yield replace(own, traceparent=traceparent or own.traceparent)
    if chain and status != "SUCCESS":
        yield from never_run(app, chain[0], request, status, value)


def never_run(app: str, signature: Request, cause: Request, status: Status, value: Any) -> Iterator[Ending]:
    """Return the endings of a task or a whole canvas that will not run, because `cause` ended like this."""
    for last in _last_of(signature):
        options = last.get("options") or {}
        own = options.get("headers") or {}
        if options.get("task_id") and header("route", own) != "never":
            request = {"task": last.get("task"), "hostname": cause.get("hostname")}
            request |= {name: header(name, own) or header(name, cause) for name in ("meta", "queued_at", "traceparent")}
            yield _ending(app, options["task_id"], request, status, value)


def destination(app: str, chosen: Settings, request: Request) -> str:
    """Return the queue for an app's envelope."""
    return answer_queue(app, chosen, request) or queue_of(app, chosen.apps[app])


def app_of(chosen: Settings, request: Request) -> str | None:
    """Return the app that a task is for; None if it names none, or if its headers can't be read."""
    try:
        return identify(chosen, request)
    except (AttributeError, TypeError):
        return None


def _last_of(signature: Request) -> Iterator[Request]:
    """Return the tasks whose results are the canvas's result. A chord's result is its body's, not its parts'."""
    options, kwargs = signature.get("options") or {}, signature.get("kwargs") or {}
    kind = signature.get("subtask_type")
    if options.get("chain"):
        yield from _last_of(options["chain"][0])
    elif options.get("chord"):
        return
    elif kind == "chord" and kwargs.get("body"):
        yield from _last_of(kwargs["body"])
    elif kind == "chain" and kwargs.get("tasks"):
        yield from _last_of(kwargs["tasks"][-1])
    elif kind == "group":
        for member in kwargs.get("tasks") or ():
            yield from _last_of(member)
    else:
        yield signature


def _ending(app: str, task_id: str, request: Request, status: Status, value: Any) -> Ending:
    retries = request.get("retries")
    return Ending(
        id=str(task_id),
        task=str(request.get("task")),
        app=app,
        status=status,
        result=value if status == "SUCCESS" else None,
        error=None if status == "SUCCESS" else value,
        attempt=max(retries if isinstance(retries, int) else 0, 0) + 1,
        traceparent=checked(header("traceparent", request)),
        meta=header("meta", request),
        queued_at=header("queued_at", request),
        finished_at=time(),
        worker=str(request.get("hostname") or socket.gethostname()),
    )
