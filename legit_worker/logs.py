"""`LEGIT_WORKER_LOG=json`: each line of a worker's log is one JSON object.

In: Celery's own set-up of the log. Out: the same handlers, levels and files, with another format. Where the project
sets up the log itself, by `setup_logging`, handlers of its own, or formatters of its own, nothing changes. What Celery
writes past its log, before that is set up and from handlers of signals, is an object, too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from time import time
from typing import Any

from celery import signals
from celery._state import get_current_task
from celery.apps import worker as program
from celery.utils.log import ColorFormatter

from legit_worker.apps import identify
from legit_worker.models.handle import forget_calls, last_called
from legit_worker.settings import Settings

#: What a record has anyway. What else it has, a caller gave as `extra`.
OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "task_id", "task_name"}

#: Celery's own `extra`: the task's arguments and result, of which the message has the beginning.
DATA = "data"

#: The numbers among these that are fields of the object.
NUMBERS = ("runtime", "waited")


class JsonFormatter(logging.Formatter):
    """Any thread may use it. A value that JSON doesn't have is written as Python writes it."""

    def __init__(self, chosen: Settings) -> None:
        super().__init__()
        self._chosen = chosen

    def format(self, record: logging.LogRecord) -> str:
        """Return one object on one line, with what is known."""
        fields: dict[str, Any] = {
            **_fields(record.created, record.levelname, record.name, _message(record)),
            **self._of_task(record),
            **({"exception": _exception(record.exc_info[1])} if record.exc_info and record.exc_info[1] else {}),
            **({"stack": record.stack_info} if record.stack_info else {}),
        }
        known = OWN | {DATA} if _is_celerys(record) else OWN
        extra = {name: value for name, value in vars(record).items() if name not in known}
        return _line({**extra, **fields})

    def _of_task(self, record: logging.LogRecord) -> dict[str, Any]:
        """The task that the line is about: the one that runs here, or the one that Celery's line names."""
        task, data = get_current_task(), getattr(record, DATA, None) if _is_celerys(record) else None
        if task is not None and task.request.id:
            fields = {"task_id": task.request.id, "task": task.name, **self._of_request(task.request)}
        elif isinstance(data, dict) and "id" in data:
            fields = {"task_id": data["id"], "task": data.get("name")}
        else:
            fields = {}
        numbers = record.args if isinstance(record.args, dict) else {}
        return {**fields, **{name: numbers[name] for name in NUMBERS if name in numbers}}

    def _of_request(self, request: Any) -> dict[str, str]:
        """The app that the task is for, and the model that it called last, as far as they are known."""
        known = {"app": identify(self._chosen, vars(request)), "model": last_called.get()}
        return {name: value for name, value in known.items() if value is not None}


def _forget_model(task: Any, **_: Any) -> None:
    """A task begins. In pools that run tasks one after the other, the last one's model is still known."""
    if not task.request.is_eager:
        forget_calls()


def _is_celerys(record: logging.LogRecord) -> bool:
    """Tell whether Celery wrote the line itself."""
    return record.name.partition(".")[0] == "celery"


def _fields(created: float, level: str, name: str, message: str) -> dict[str, Any]:
    """Return what each object has. `created` is in seconds since the epoch."""
    moment = datetime.fromtimestamp(created, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"time": moment, "level": level, "logger": name, "message": message}


def _message(record: logging.LogRecord) -> str:
    """Return the message, and its parts if they don't fit together."""
    try:
        return record.getMessage()
    except Exception:
        return f"{_written(record.msg, str)} {_written(record.args)}"


def _exception(error: BaseException) -> dict[str, str]:
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return {"type": type(error).__name__, "message": _written(error, str), "traceback": "".join(lines)}


def _line(fields: dict[str, Any]) -> str:
    """Write an object on one line that every reader of JSON takes, whatever its values are. Never raises."""
    try:
        line = _json(fields)
    except Exception:
        line = _json({name: _fit(value) for name, value in fields.items()})
    # Half of a surrogate pair, as in the name of a file, has no bytes: it becomes JSON's own escape.
    return line.encode(errors="backslashreplace").decode()


def _json(value: Any) -> str:
    return json.dumps(value, default=_written, ensure_ascii=False, allow_nan=False)


def _fit(value: Any) -> Any:
    """Return a value that JSON has, or its text: of a circle, a number that is not finite, a key that is no string."""
    try:
        _json(value)
    except Exception:
        return _written(value)
    return value


def _written(value: Any, write: Callable[[Any], str] = repr) -> str:
    """Write a value as Python does, though its own class may raise."""
    try:
        return write(value)
    except Exception as error:
        return f"<{type(value).__name__}: {type(error).__name__} as it was written>"


def write_json(chosen: Settings) -> None:
    """Let Celery's handlers of this process and its children write JSON from now on."""
    formatter = JsonFormatter(chosen)

    def set_up(logger: logging.Logger | None = None, **_: Any) -> None:
        for handler in logger.handlers if logger is not None else ():
            if isinstance(handler.formatter, ColorFormatter | JsonFormatter):
                handler.setFormatter(formatter)

    program.safe_say = _say
    signals.task_prerun.connect(_forget_model, dispatch_uid="legit_worker.logs")
    for signal in (signals.after_setup_logger, signals.after_setup_task_logger):
        signal.connect(set_up, weak=False, dispatch_uid="legit_worker.logs")
    for name in (None, "celery", "celery.task", "celery.redirected"):
        set_up(logging.getLogger(name))


def write_first_warnings() -> None:
    """Let warnings be objects until Celery sets up its log, which takes over then: it warns a user who is root."""
    warnings.showwarning = _show


def _show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """Mirror `warnings.showwarning`."""
    text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(_line(_fields(time(), "WARNING", "py.warnings", text)), file=file or sys.stderr)


def _say(message: str, file: Any = sys.__stderr__) -> None:
    """Mirror `celery.apps.worker.safe_say` (5.5 to 5.7), by which signals' handlers tell of a shutdown."""
    line = _line(_fields(time(), "INFO", program.__name__, message))
    with suppress(AttributeError, OSError, ValueError):  # there is no such file, or nobody reads it
        os.write(file.fileno(), f"{line}\n".encode())
