"""A real Prometheus scrapes a real worker: each alert, and each query of the dashboard, of the documents and of KEDA.

In: deploy/, a worker at work. Out: what Prometheus answers. The only changes to its configuration are the address of
the worker and shorter intervals.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
import yaml
from harness import ANSWER_SECONDS, ROOT, SIMULATED, StartWorker, Worker, poll
from needs import missing
from ownserver import free_port
from scraping import SERVING, endpoint_of

sys.path.append(str(ROOT / "scripts" / "lib"))

import dashboard

PROMETHEUS = ROOT / "deploy" / "prometheus"

#: Panels that are empty while nothing of the kind happened.
RARE = {"Results to apps"}


@dataclass(frozen=True)
class Server:
    """A Prometheus that runs."""

    port: int

    def get(self, path: str, **query: str) -> Any:
        """What its HTTP interface answers. Raises if it refuses a query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)["data"]

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that a query gives."""
        found: list[dict[str, Any]] = self.get("query", query=query)["result"]
        return found


@pytest.fixture(scope="module")
def worker(start_module_worker: StartWorker) -> Worker:
    worker = start_module_worker("project", environment={**SIMULATED, "LEGIT_WORKER_ENABLED": "1", **SERVING})
    worker.answers([worker.send("one", f"a task of {number}") for number in range(20)])
    return worker


@pytest.fixture(scope="module")
def server(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    binary = shutil.which("prometheus")
    if binary is None:
        missing("prometheus is not installed")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = configuration["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{endpoint_of(worker).port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    server = Server(port)

    def has_rates() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        worker.ask("one", "a task for the rates")
        try:
            found = server.ask("sum(rate(legit_worker_batch_items_count[1m])) > 0")
            return bool(found) and bool(server.ask('up{job="legit-worker"} == 1'))
        except OSError:
            return False

    try:
        poll(has_rates, "two scrapes of the worker")
        yield server
    finally:
        process.kill()
        process.wait()


def test_each_panel_of_the_dashboard_shows_something(server: Server) -> None:
    found: dict[str, int] = {}
    for title, query in dashboard.queries():
        found[title] = found.get(title, 0) + len(server.ask(query))
    assert {title for title, series in found.items() if not series} <= RARE


def test_a_sound_worker_sets_off_no_alert(server: Server) -> None:
    def rules() -> list[dict[str, Any]]:
        found = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    evaluated = poll(rules, "rules that were evaluated")
    assert {rule["name"]: rule["health"] for rule in evaluated} == {rule["name"]: "ok" for rule in evaluated}
    assert len(evaluated) == len(re.findall("- alert:", (PROMETHEUS / "alerts.yml").read_text()))
    assert [rule["name"] for rule in evaluated if rule["alerts"]] == []


def test_each_query_of_the_page_of_metrics_gives_a_number(server: Server) -> None:
    rows = re.findall(r"^\| .* \| `(.*legit_worker_.*)` \|$", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert rows
    failed = [query for query in rows if not server.ask(query) and 'state="failed"' not in query]
    assert failed == []


def test_what_waits_and_what_is_held_are_all_messages_and_the_list_alone_misleads(
    server: Server, worker: Worker
) -> None:
    """A worker holds tasks that are due later, so it holds them for as long as the test looks."""
    if not worker.broker.url.startswith("redis"):
        pytest.skip("RabbitMQ counts both by itself")
    triggers = yaml.safe_load((ROOT / "deploy" / "keda" / "redis.yaml").read_text())["spec"]["triggers"]
    (query,) = [trigger["metadata"]["query"] for trigger in triggers if trigger["type"] == "prometheus"]

    def held() -> int:
        (series,) = server.ask(query)
        return int(series["value"][1])

    poll(lambda: held() == 0, "a worker that holds nothing")
    sent = [worker.client.send_task("one", ["later"], countdown=3600) for _ in range(5)]
    poll(lambda: held() == len(sent), "all messages among those that are held")
    assert redis.Redis.from_url(worker.broker.url).llen(worker.broker.queue) == 0
