"""The usual project, which sets up its log in the way that `PROJECT_LOGGING` names."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from celery import signals
from project import app

__all__ = ["app"]

#: Begins each line of the project's own.
FORMAT = "own: %(message)s"


def set_up(**_: Any) -> None:
    """As a project that wants no set-up of Celery's."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=FORMAT, force=True)


def reformat(logger: logging.Logger, **_: Any) -> None:
    """As a project that wants another format."""
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter(FORMAT))


match os.environ.get("PROJECT_LOGGING"):
    case "setup":
        signals.setup_logging.connect(set_up)
    case "after":
        signals.after_setup_logger.connect(reformat)
        signals.after_setup_task_logger.connect(reformat)
    case "handlers":
        app.conf.worker_hijack_root_logger = False
        set_up()


@app.task(name="says")
def says(words: str) -> None:
    """To the task's logger, to a library's, and to the standard output."""
    logging.getLogger("a.library").warning("%s to the library", words, extra={"colour": "red"})
    print(f"{words} to the output")
