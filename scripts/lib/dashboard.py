"""Writes Grafana's dashboard: `.venv/bin/python scripts/lib/dashboard.py`.

In: the table below. Out: deploy/grafana/dashboards/legit-worker.json. A test looks whether it is current. Another test
asks a Prometheus each query.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "grafana" / "dashboards" / "legit-worker.json"

#: Grafana's grid has 24 columns. Three panels stand side by side.
WIDTH, HEIGHT = 8, 8

DATASOURCE = {"type": "prometheus", "uid": "prometheus"}


@dataclass(frozen=True)
class Panel:
    """One picture. A query's `%` stands for the workers that are chosen."""

    title: str
    unit: str
    what: str
    #: By legend, the query.
    queries: dict[str, str]


PANELS = (
    Panel(
        "Tasks a second",
        "ops",
        "Tasks that ended, by their state.",
        {"{{state}}": "sum by (state) (rate(legit_worker_tasks_total{%}[$__rate_interval]))"},
    ),
    Panel(
        "Tasks a second, by app",
        "ops",
        "Apps that the settings don't name are `other`.",
        {"{{app}}": "sum by (app) (rate(legit_worker_tasks_total{%}[$__rate_interval]))"},
    ),
    Panel(
        "Time of a task",
        "s",
        "From a message's arrival at the worker until its result is stored.",
        {
            f"p{part}": f"histogram_quantile(0.{part}, sum by (le) "
            "(rate(legit_worker_task_seconds_bucket{%}[$__rate_interval])))"
            for part in (50, 95, 99)
        },
    ),
    Panel(
        "Time that tasks wait",
        "s",
        "p95: before they begin, and then for company, their turn, or a model.",
        {
            "before": "histogram_quantile(0.95, sum by (le) "
            "(rate(legit_worker_task_queue_seconds_bucket{%}[$__rate_interval])))",
            "parked": "histogram_quantile(0.95, sum by (le) "
            "(rate(legit_worker_task_wait_seconds_bucket{%}[$__rate_interval])))",
        },
    ),
    Panel(
        "Tasks in the workers",
        "short",
        "Begun, of these parked, and not begun.",
        {
            "running": "sum(legit_worker_tasks_running{%})",
            "parked": "sum(legit_worker_tasks_parked{%})",
            "not begun": "sum(legit_worker_tasks_not_started{%})",
            "hold limit": "sum(legit_worker_hold_limit{%})",
        },
    ),
    Panel(
        "Predicted work that waits",
        "s",
        "Seconds of the device for all items that wait.",
        {"{{instance}}": "legit_worker_predicted_wait_seconds{%}"},
    ),
    Panel(
        "The device computes",
        "percentunit",
        "The part of the time in which a batch runs.",
        {"{{instance}}": "sum by (instance) (rate(legit_worker_batch_seconds_sum{%}[$__rate_interval]))"},
    ),
    Panel(
        "Items in a batch",
        "short",
        "On average. One is as slow as stock Celery.",
        {
            "{{model}}": "sum by (model) (rate(legit_worker_batch_items_sum{%}[$__rate_interval])) / "
            "sum by (model) (rate(legit_worker_batch_items_count{%}[$__rate_interval]))"
        },
    ),
    Panel(
        "Padding",
        "percentunit",
        "The part of what is computed for nothing.",
        {
            "{{model}}": "1 - sum by (model) (rate(legit_worker_computed_cost_total{%}[$__rate_interval])) / "
            "sum by (model) (rate(legit_worker_batch_padded_cost_sum{%}[$__rate_interval]))"
        },
    ),
    Panel(
        "Memory",
        "bytes",
        "What the worker may take, and what its weights and batches take of it.",
        {
            "budget": "sum(legit_worker_memory_budget_bytes{%})",
            "weights": "sum(legit_worker_memory_weights_bytes{%})",
            "reserve": "sum(legit_worker_memory_reserve_bytes{%})",
            "others": "sum(legit_worker_memory_others_bytes{%})",
        },
    ),
    Panel(
        "Models in memory",
        "short",
        "1 while a model is there.",
        {"{{model}}": 'sum by (model) (legit_worker_model_state{%, state="resident"})'},
    ),
    Panel(
        "Loads and evictions",
        "short",
        "In the last five minutes.",
        {
            "load {{model}}": "sum by (model) (increase(legit_worker_model_loads_total{%}[5m]))",
            "evict {{model}}": "sum by (model) (increase(legit_worker_model_evictions_total{%}[5m]))",
            "out of memory {{model}}": "sum by (model) (increase(legit_worker_out_of_memory_total{%}[5m]))",
        },
    ),
    Panel(
        "Messages held",
        "short",
        "Taken and not acked, on Redis.",
        {"{{instance}}": "legit_worker_held_messages{%}"},
    ),
    Panel(
        "Given up, given back",
        "short",
        "Dead letters, and messages of dead workers, in the last five minutes.",
        {
            "dead: {{kind}} {{app}}": "sum by (kind, app) (increase(legit_worker_dead_letters_total{%}[5m]))",
            "given back": "sum(increase(legit_worker_recovered_messages_total{%}[5m]))",
            "come again": "sum(increase(legit_worker_messages_redelivered_total{%}[5m]))",
        },
    ),
    Panel(
        "Results to apps",
        "ops",
        "Envelopes for apps' queues, and those that wait for a server.",
        {
            "{{app}} {{outcome}}": "sum by (app, outcome) "
            "(rate(legit_worker_routed_results_total{%}[$__rate_interval]))",
            "{{app}} waits": "sum by (app) (legit_worker_results_waiting{%})",
        },
    ),
)


def queries() -> Iterator[tuple[str, str]]:
    """Each panel's title and query, with nothing of Grafana's in it."""
    for panel in PANELS:
        for query in panel.queries.values():
            yield panel.title, plain(query)


def plain(query: str) -> str:
    """A panel's query as Prometheus takes it, for all workers."""
    return query.replace("{%", "{").replace("{, ", "{").replace("$__rate_interval", "1m")


def dashboard() -> dict[str, Any]:
    """What Grafana reads."""
    return {
        "uid": "legit-worker",
        "title": "legit_worker",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_workers()]},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def written() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


def metrics(query: str) -> set[str]:
    """The names of metrics in a query, without what a histogram adds."""
    return {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\blegit_worker_(\w+)", query)}


def _workers() -> dict[str, Any]:
    """The menu that chooses workers."""
    query = "label_values(legit_worker_info, instance)"
    choice = {"name": "instance", "label": "Worker", "type": "query", "datasource": DATASOURCE, "query": query}
    return choice | {"refresh": 2, "multi": True, "includeAll": True, "allValue": ".*"}


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    x, y = number % (24 // WIDTH) * WIDTH, number // (24 // WIDTH) * HEIGHT
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.what,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": DATASOURCE,
                "expr": query.replace("{%", '{instance=~"$instance"'),
                "legendFormat": legend,
            }
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }


if __name__ == "__main__":
    FILE.write_text(written())
