"""The usual project, whose worker reports itself several times a second instead of once a minute."""

from __future__ import annotations

from project import app

from legit_worker.pool import reports

reports.BUSY_SECONDS = 0.2

__all__ = ["app"]
