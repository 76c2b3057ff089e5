"""Keeps the progress bars and the advice of model libraries out of a worker's log.

In: the process of a worker. Out: nothing. Otherwise Celery would log each redraw of a bar as a warning, and the INFO
lines of libraries between the worker's own. Warnings and errors of the libraries stay.
"""

from __future__ import annotations

import logging
import os
import sys

#: The libraries read these variables at their import. The operator's own values stay.
ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}

#: The logger whose level also decides whether `encode` shows a bar.
LIBRARY = "sentence_transformers"

#: These loggers tell each request at INFO. A load makes dozens. The requests of a task's own code are still logged.
HTTP = ("httpx", "httpx2")


def quiet_libraries() -> None:
    """Silence the libraries before models are loaded, also those that the project has imported already."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if logging.getLogger(LIBRARY).level == logging.NOTSET:
        logging.getLogger(LIBRARY).setLevel(logging.WARNING)
    for name in HTTP:
        logging.getLogger(name).addFilter(_is_kept)
    if os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1" and "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]


def _is_kept(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.threadName != "legit-loader"
