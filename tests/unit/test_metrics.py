"""What metrics say of what happened: histograms, requests of every pool, health, and the text that is scraped."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from legit_worker.batching.histogram import ITEMS, SECONDS, Histogram
from legit_worker.metrics.catalogue import METRICS, PREFIX, Sample
from legit_worker.metrics.collector import Collector
from legit_worker.metrics.health import ALIVE_SECONDS, BATCH_SECONDS, Health, Holder
from legit_worker.metrics.requests import Tally, counted
from legit_worker.settings import AppSettings, Settings

# Histograms


@given(st.lists(st.floats(min_value=0, max_value=1e6, allow_nan=False)))
def test_a_histogram_counts_each_number_once_and_below_each_bound_that_it_keeps(numbers: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for number in numbers:
        histogram.observe(number)
    expected = [sum(number <= bound for number in numbers) for bound in SECONDS]
    assert histogram.at_most() == [*expected, len(numbers)]
    assert histogram.sum == pytest.approx(sum(numbers))


# The text


def scraped(*samples: Sample) -> dict[str, Any]:
    """What Prometheus parses of these, by name."""
    text = generate_latest(Collector(lambda: samples)).decode()  # type: ignore[arg-type]
    families = text_string_to_metric_families(text)
    return {family.name: family for family in families if family.name.startswith(PREFIX)}


def test_each_kind_of_metric_is_written_as_prometheus_has_it() -> None:
    histogram = Histogram(ITEMS)
    for items in (1, 3, 5000):
        histogram.observe(items)
    families = scraped(
        ("window", (), 1024), ("tasks_total", ("embed", "alpha", "failed"), 3), ("batch_items", ("m",), histogram)
    )
    assert {family.type for family in families.values()} == {"gauge", "counter", "histogram"}
    (tasks,) = families[f"{PREFIX}tasks"].samples
    assert tasks.labels == {"task": "embed", "app": "alpha", "state": "failed"}
    assert (tasks.name, tasks.value) == (f"{PREFIX}tasks_total", 3)
    values = {
        (sample.name, sample.labels.get("le")): sample.value for sample in families[f"{PREFIX}batch_items"].samples
    }
    name = f"{PREFIX}batch_items"
    assert values[f"{name}_bucket", "1.0"] == 1
    assert values[f"{name}_bucket", "4.0"] == 2
    assert values[f"{name}_bucket", "+Inf"] == values[f"{name}_count", None] == 3
    assert values[f"{name}_sum", None] == 5004


def test_labels_that_are_not_the_catalogues_are_an_error() -> None:
    with pytest.raises(ValueError, match="window has the labels"):
        scraped(("window", ("m",), 1))


def test_a_dictionary_that_grows_meanwhile_is_read_again() -> None:
    looks = iter((True, True, False))

    def source() -> Iterator[Sample]:
        yield "window", (), 1
        if next(looks):
            raise RuntimeError("dictionary changed size during iteration")

    families = list(Collector(source).collect())
    assert families[0].samples[0].value == 1


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_fields_rules(metric: Any) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not {"milliseconds", "ms", "us", "mb", "kb"} & set(metric.name.split("_"))
    assert metric.help.endswith(".")


# Requests


class Request:
    """The part of Celery's that counts."""

    eta = None

    def __init__(self, message: Any) -> None:
        self.task, self.name = SimpleNamespace(name="embed"), "a name that a message chose"
        self.request_dict: dict[str, Any] = {}

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """As Celery's."""

    def on_success(self, outcome: Any) -> None:
        """As Celery's: a failure tells of itself."""
        if outcome[0]:
            self.send_event("task-failed") if outcome[1] == "failed" else None

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """As Celery's of 5.5, which tells nobody."""

    def send_event(self, type: str, **fields: Any) -> None:
        """As Celery's."""


def tally(here: tuple[str, float] | None = None) -> Tally:
    """Of a worker with one app."""
    return Tally(Settings(apps={"alpha": AppSettings()}), lambda: here)


def counts(tally: Tally, name: str) -> dict[tuple[str, ...], Any]:
    return {labels: getattr(value, "sum", value) for sample, labels, value in tally.samples() if sample == name}


MESSAGE = SimpleNamespace(delivery_info={}, headers={})


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (lambda request: request.on_success((False, 1, 0.1)), "succeeded"),
        (lambda request: request.on_success((True, "failed", 0.1)), "failed"),
        (lambda request: request.on_success((True, "ignored", 0.1)), "ignored"),
        (lambda request: request.on_timeout(False, 1), "failed"),
        (lambda request: request.send_event("task-revoked"), "revoked"),
        (lambda request: request.send_event("task-retried"), "retried"),
    ],
)
def test_a_task_is_counted_once_by_its_end(end: Any, expected: str) -> None:
    counting = tally()
    request = counted(Request, counting, "embed")(MESSAGE)
    end(request)
    end(request)
    assert counts(counting, "tasks_total") == {("embed", "other", expected): 1}
    assert counts(counting, "messages_received_total") == {("embed",): 1}


def test_a_soft_time_limit_and_a_start_are_no_end() -> None:
    counting = tally()
    request = counted(Request, counting, "embed")(MESSAGE)
    request.on_accepted(1, request.came + 0.5)
    request.on_timeout(True, 1)
    request.send_event("task-started")
    assert counts(counting, "tasks_total") == {}
    request.on_success((False, 1, 0.1))
    assert counts(counting, "task_queue_seconds") == {("embed", "other"): pytest.approx(0.5)}


@pytest.mark.parametrize(("here", "app"), [(("alpha", 0.25), "alpha"), (("", 0.25), "other"), (None, "alpha")])
def test_the_app_is_the_running_tasks_or_the_messages(here: tuple[str, float] | None, app: str) -> None:
    counting = tally(here)
    request = counted(Request, counting, "embed")(MESSAGE)
    request.request_dict = {"headers": {"app": "ALPHA"}}
    request.on_success((False, 1, 0.1))
    assert counts(counting, "tasks_total") == {("embed", app, "succeeded"): 1}
    assert counts(counting, "task_wait_seconds") == {("embed", app): 0.25 if here else 0}


def test_an_app_that_nobody_configured_is_no_label() -> None:
    counting = tally()
    for number in range(100):
        request = counted(Request, counting, "embed")(MESSAGE)
        request.request_dict = {"headers": {"app": f"stranger-{number}"}}
        request.on_success((False, 1, 0.1))
    assert counts(counting, "tasks_total") == {("embed", "other", "succeeded"): 100}


def test_a_task_that_was_to_start_later_has_no_seconds() -> None:
    counting = tally()
    request = counted(Request, counting, "embed")(MESSAGE)
    request.eta = "2026-01-01"
    request.on_accepted(1, 1e9)
    request.on_success((False, 1, 0.1))
    assert counts(counting, "tasks_total") == {("embed", "other", "succeeded"): 1}
    assert counts(counting, "task_seconds") == counts(counting, "task_queue_seconds") == {("embed", "other"): 0}


def test_a_message_of_a_dead_worker_is_a_redelivery() -> None:
    counting = tally()
    counted(Request, counting, "embed")(SimpleNamespace(delivery_info={}, headers={"x-delivery-count": 2}))
    assert counts(counting, "messages_redelivered_total") == {("embed",): 1}


# Health


class Pool:
    """What has its thread, and which models it lacks."""

    def __init__(self, held: Holder | None = None, *missing: str) -> None:
        self.held, self.lacks = held, list(missing)

    def holder(self) -> Holder | None:
        return self.held

    def missing(self) -> list[str]:
        return self.lacks


def health(age: float, pool: Pool | None = None, *steps: str) -> Health:
    """A worker that started, took those steps, and whose loop came round this many seconds ago."""
    now = [0.0]
    made = Health(pool, clock=lambda: now[0])
    made.connected()
    for step in steps:
        getattr(made, step)()
    now[0] = age
    return made


TASK, BATCH = Holder(what="embed[1]", is_batch=False), Holder(what="a batch", is_batch=True)


@pytest.mark.parametrize(
    ("age", "pool", "steps", "is_alive"),
    [
        (ALIVE_SECONDS - 1, Pool(TASK), (), True),
        (ALIVE_SECONDS + 1, Pool(TASK), (), False),
        (ALIVE_SECONDS + 1, Pool(), (), False),
        (ALIVE_SECONDS + 1, None, (), False),
        (ALIVE_SECONDS + 1, Pool(BATCH), (), True),
        (BATCH_SECONDS + 1, Pool(BATCH), (), False),
        (ALIVE_SECONDS + 1, Pool(TASK), ("away",), True),
        (ALIVE_SECONDS + 1, Pool(TASK), ("ending",), True),
        (ALIVE_SECONDS + 1, Pool(TASK), ("away", "connected"), False),
    ],
)
def test_a_worker_is_alive_unless_nothing_excuses_it(
    age: float, pool: Pool | None, steps: tuple[str, ...], is_alive: bool
) -> None:
    assert health(age, pool, *steps).alive().is_yes == is_alive


def test_a_worker_that_starts_may_load_for_as_long_as_it_takes() -> None:
    now = [0.0]
    made = Health(Pool(TASK), clock=lambda: now[0])
    now[0] = 1e6
    assert made.alive().is_yes
    assert made.ready().why == {"reasons": ["the worker starts"]}


@pytest.mark.parametrize(
    ("pool", "steps", "reasons"),
    [
        (Pool(), (), []),
        (None, (), []),
        (Pool(None, "model 'm' is loading"), (), ["model 'm' is loading"]),
        (Pool(), ("away",), ["the broker is away"]),
        (Pool(), ("away", "connected"), []),
        (Pool(), ("ending",), ["the worker ends"]),
    ],
)
def test_a_worker_is_ready_if_it_takes_and_computes_tasks(
    pool: Pool | None, steps: tuple[str, ...], reasons: list[str]
) -> None:
    ready = health(1.0, pool, *steps).ready()
    assert (ready.is_yes, ready.why) == (not reasons, {"reasons": reasons})


def test_celerys_own_flags_end_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "should_stop", 0)  # an exit code
    assert health(1.0).ready().why == {"reasons": ["the worker ends"]}
