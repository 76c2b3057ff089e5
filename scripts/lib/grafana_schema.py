"""Looks whether Grafana knows each field of the dashboard: `scripts/deploy` runs it.

In: deploy/grafana/dashboards/legit-worker.json. Out: exit code 1, and the fields that Grafana's own schema loses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

FILE = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "legit-worker.json"


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """Each place in `given` that is not the same in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from lost(value, kept.get(name), f"{place}/{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(value, other, f"{place}/{number}")
    elif given != kept:
        yield place


if __name__ == "__main__":
    plugins.register_default_plugins()
    given = json.loads(FILE.read_text())
    unknown = list(lost(given, json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder))))
    for place in unknown:
        print(f"{FILE.name}: Grafana does not know {place}")
    sys.exit(bool(unknown))
