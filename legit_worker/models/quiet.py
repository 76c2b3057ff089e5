"""Keeps the progress bars and the advice of model libraries out of a worker's log.

In: the process of a worker. Out: nothing. Celery logs each redraw of a bar as a warning, and each INFO line of a
library beside the worker's own; an operator then looks for the cause. Warnings and errors of the libraries stay.
"""

from __future__ import annotations

import logging
import os
import sys

#: Read by the libraries when they are imported. What the operator chose stays.
ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}

#: The logger whose level also decides whether `encode` shows a bar.
LIBRARY = "sentence_transformers"

#: These tell each request at INFO. A load makes dozens; a task's own are its own affair.
HTTP = ("httpx", "httpx2")


def quiet_libraries() -> None:
    """Before models are loaded; libraries that the project has imported already are told by their own functions."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if logging.getLogger(LIBRARY).level == logging.NOTSET:
        logging.getLogger(LIBRARY).setLevel(logging.WARNING)
    for name in HTTP:
        logging.getLogger(name).addFilter(_is_no_loads)
    if os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1" and "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]


def _is_no_loads(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.threadName != "legit-loader"
