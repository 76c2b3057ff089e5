"""The usual project, in a Python that has no torch."""

from __future__ import annotations

import sys

sys.modules["torch"] = None  # type: ignore[assignment]

from project import app  # noqa: E402

__all__ = ["app"]
