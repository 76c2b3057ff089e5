"""The usual project, in a Python that has no prometheus_client."""

from __future__ import annotations

import importlib.util
from typing import Any

from project import app

found = importlib.util.find_spec


def find_spec(name: str, *rest: Any) -> Any:
    """As if it were not installed."""
    return None if name == "prometheus_client" else found(name, *rest)


importlib.util.find_spec = find_spec

__all__ = ["app"]
