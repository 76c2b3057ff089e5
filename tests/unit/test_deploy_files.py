"""The alerts and the dashboard in deploy/ ask for metrics that there are, and each alert is explained."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "lib"))

import dashboard  # noqa: E402

from legit_worker.metrics.catalogue import METRICS  # noqa: E402

PROMETHEUS = ROOT / "deploy" / "prometheus"
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
KNOWN = {metric.name for metric in METRICS}


def test_the_dashboard_is_current() -> None:
    assert dashboard.FILE.read_text() == dashboard.written(), "run .venv/bin/python scripts/lib/dashboard.py"


@pytest.mark.parametrize(("title", "query"), list(dashboard.queries()), ids=lambda part: part[:40])
def test_each_panel_asks_for_metrics_that_there_are(title: str, query: str) -> None:
    assert dashboard.metrics(query)
    assert dashboard.metrics(query) <= KNOWN, title


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_asks_for_metrics_that_there_are_and_has_its_section_and_its_test(alert: str) -> None:
    rule = ALERTS[alert]
    assert dashboard.metrics(rule["expr"]) <= KNOWN
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{alert.lower()}"
    section = (ROOT / "docs" / "operations.md").read_text().split(f"\n### {alert}\n")[1].split("\n#")[0]
    assert "**It means**" in section
    assert "**Do**" in section
    assert f'alertname="{alert}"' in (PROMETHEUS / "alerts.test.yml").read_text()


def test_no_section_is_left_of_an_alert_that_is_gone() -> None:
    sections = re.findall(r"^### (LegitWorker\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert sections == list(ALERTS)


def test_each_file_that_keda_is_given_asks_for_metrics_that_there_are() -> None:
    files = sorted((ROOT / "deploy" / "keda").glob("*.yaml"))
    assert files
    for file in files:
        assert dashboard.metrics(file.read_text()) <= KNOWN, file.name
