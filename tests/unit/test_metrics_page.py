"""docs/metrics.md says what the code says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "lib"))

from metrics_page import PAGE, current

from legit_worker.metrics.catalogue import METRICS, PREFIX


def test_the_page_is_current() -> None:
    page = PAGE.read_text()
    assert current(page) == page, "run .venv/bin/python scripts/lib/metrics_page.py"


def test_each_query_names_metrics_that_are_there() -> None:
    known = {metric.name for metric in METRICS}
    named = set(re.findall(rf"{PREFIX}(\w+)", PAGE.read_text()))
    assert named
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in named} <= known
