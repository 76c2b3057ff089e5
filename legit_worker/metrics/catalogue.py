"""Which metrics there are: names, labels, meanings, and what other servers call the same thing. Pure.

The collector makes families of these, and docs/metrics.md is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from legit_worker.batching.histogram import Histogram

#: Begins each name.
PREFIX = "legit_worker_"

#: What stands in a label for a task, an app or a model that the worker's project and settings don't know.
OTHER = "other"

#: One figure: the metric's name without its prefix, the values of its labels, and the number.
Sample = tuple[str, tuple[str, ...], "float | Histogram"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric."""

    #: Without the prefix.
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    #: What text-embeddings-inference, Triton and celery-exporter call the same thing; empty if they don't have it.
    tei: str = ""
    triton: str = ""
    celery: str = ""
    #: Whether every pool has it. The others are `ModelPool`'s.
    any_pool: bool = False


TASK, MODEL = ("task", "app"), ("model",)

METRICS = (
    Metric(
        name="info",
        kind="gauge",
        labels=("version", "node", "role", "pool", "device"),
        help="Always 1. The labels say which worker this is.",
        celery="celery_worker_up",
        any_pool=True,
    ),
    Metric(
        name="ready",
        kind="gauge",
        help="1 if /readyz says yes.",
        triton="nv_model_ready_state",
        any_pool=True,
    ),
    Metric(
        name="loop_age_seconds",
        kind="gauge",
        help="Seconds since the worker's loop last came round.",
        any_pool=True,
    ),
    # Tasks
    Metric(
        name="messages_received_total",
        kind="counter",
        labels=("task",),
        help="Messages that this worker took, by their task.",
        tei="te_request_count",
        celery="celery_task_received_total",
        any_pool=True,
    ),
    Metric(
        name="messages_redelivered_total",
        kind="counter",
        labels=("task",),
        help="Of these, messages that another worker had when it died or lost its connection.",
        any_pool=True,
    ),
    Metric(
        name="tasks_total",
        kind="counter",
        labels=("task", "app", "state"),
        help="Tasks that ended: succeeded, failed, retried, revoked, rejected, ignored, cancelled, or unknown.",
        tei="te_request_success, te_request_failure",
        triton="nv_inference_request_success, nv_inference_request_failure",
        celery="celery_task_succeeded_total, _failed_total, _retried_total, _revoked_total, _rejected_total",
        any_pool=True,
    ),
    Metric(
        name="task_queue_seconds",
        kind="histogram",
        labels=TASK,
        help="From a message's arrival at this worker until its task begins.",
        any_pool=True,
    ),
    Metric(
        name="task_wait_seconds",
        kind="histogram",
        labels=TASK,
        help="How long a task was parked: for company, for its turn, for a model to load.",
        tei="te_request_queue_duration",
        triton="nv_inference_queue_duration_us",
    ),
    Metric(
        name="task_seconds",
        kind="histogram",
        labels=TASK,
        help="From a message's arrival at this worker until its task's end is stored. Its own time, celery-exporter's "
        "runtime, is this less the queue and the wait.",
        tei="te_request_duration",
        triton="nv_inference_request_duration_us",
        celery="celery_task_runtime",
        any_pool=True,
    ),
    Metric(
        name="tasks_running",
        kind="gauge",
        help="Tasks that have begun, parked ones too.",
        celery="celery_worker_tasks_active",
    ),
    Metric(name="tasks_parked", kind="gauge", help="Of these, tasks that wait for something."),
    Metric(name="tasks_not_started", kind="gauge", help="Tasks that came and have not begun."),
    Metric(name="window", kind="gauge", help="The most tasks that may run at once."),
    Metric(
        name="hold_limit",
        kind="gauge",
        help="Tasks that the worker may hold now: its predicted work fits LEGIT_WORKER_MAX_HELD_SECONDS.",
        celery="celery_active_process_count",
    ),
    Metric(
        name="predicted_wait_seconds",
        kind="gauge",
        help="Predicted seconds of the device for all items that wait in this worker.",
    ),
    # Models
    Metric(
        name="model_info",
        kind="gauge",
        labels=("model", "kind", "backend", "device"),
        help="Always 1. The labels say what the model is, and where; no device while it is not loaded.",
        tei="te_info",
    ),
    Metric(
        name="model_state",
        kind="gauge",
        labels=("model", "state"),
        help="1 for the state that the model is in: unloaded, loading, resident, draining, failed.",
        triton="nv_model_ready_state",
    ),
    Metric(name="model_weights_bytes", kind="gauge", labels=MODEL, help="Bytes of its weights, loaded or not."),
    Metric(name="model_reserve_bytes", kind="gauge", labels=MODEL, help="Bytes that its batches need beside them."),
    Metric(name="model_loads_total", kind="counter", labels=MODEL, help="How often it was loaded."),
    Metric(name="model_evictions_total", kind="counter", labels=MODEL, help="How often it left memory."),
    Metric(
        name="model_load_seconds",
        kind="gauge",
        labels=MODEL,
        help="What its last load took, without the import of libraries and the wait for other workers.",
        triton="nv_model_load_duration_secs",
    ),
    Metric(
        name="model_items_waiting",
        kind="gauge",
        labels=MODEL,
        help="Items that wait for a batch.",
        tei="te_queue_size",
        triton="nv_inference_pending_request_count",
    ),
    Metric(
        name="batch_seconds",
        kind="histogram",
        labels=MODEL,
        help="What each batch took of the device.",
        tei="te_request_inference_duration",
        triton="nv_inference_compute_infer_duration_us, nv_inference_exec_count",
    ),
    Metric(
        name="batch_items",
        kind="histogram",
        labels=MODEL,
        help="Items of each batch. The sum is all items that were computed.",
        tei="te_batch_next_size",
        triton="nv_inference_count",
    ),
    Metric(
        name="batch_padded_cost",
        kind="histogram",
        labels=MODEL,
        help="Cost of each batch with its padding, in the model's unit: tokens or pixels.",
        tei="te_batch_next_tokens",
    ),
    Metric(
        name="computed_cost_total",
        kind="counter",
        labels=MODEL,
        help="Cost that was computed, without padding. The waste is 1 - this / batch_padded_cost_sum.",
    ),
    Metric(
        name="duplicate_items_total",
        kind="counter",
        labels=MODEL,
        help="Items that were not computed, since their batch had an equal one.",
    ),
    Metric(
        name="out_of_memory_total",
        kind="counter",
        labels=MODEL,
        help="Batches that ran out of memory, and were split.",
    ),
    # Memory of the device
    Metric(name="memory_budget_bytes", kind="gauge", help="Bytes that weights and batches may take now."),
    Metric(name="memory_weights_bytes", kind="gauge", help="Bytes of all weights that are loaded."),
    Metric(name="memory_reserve_bytes", kind="gauge", help="Bytes that are kept for batches."),
    Metric(
        name="memory_total_bytes",
        kind="gauge",
        help="Bytes of the whole device, if it tells.",
        triton="nv_gpu_memory_total_bytes",
    ),
    Metric(name="memory_free_bytes", kind="gauge", help="Bytes that are free there."),
    Metric(name="memory_others_bytes", kind="gauge", help="Bytes that other processes have there."),
    Metric(name="memory_headroom_bytes", kind="gauge", help="Bytes that stay free: LEGIT_WORKER_VRAM_HEADROOM."),
    Metric(name="memory_host_cache_bytes", kind="gauge", help="Bytes of evicted weights in the host's memory."),
    Metric(name="model_requests_waiting", kind="gauge", help="Requests that wait for a model to be loaded."),
    # The broker
    Metric(
        name="held_messages",
        kind="gauge",
        help="Messages that this worker has and has not acked, on Redis.",
        celery="celery_worker_tasks_active",
    ),
    Metric(
        name="lease_renewals_total",
        kind="counter",
        help="Held messages that were renewed, so that no other worker gets them, on Redis.",
    ),
    Metric(
        name="recovered_messages_total",
        kind="counter",
        help="Messages of dead workers that this worker gave back to their queues, on Redis.",
    ),
    Metric(
        name="dead_letters_total",
        kind="counter",
        labels=("kind", "app"),
        help="What was given up: poisoned and unreadable messages, and an app's results.",
    ),
    # Results
    Metric(
        name="result_backend_away_seconds",
        kind="gauge",
        help="Seconds for which the result backend has taken no results; 0 while it takes them.",
    ),
    Metric(
        name="routed_results_total",
        kind="counter",
        labels=("app", "outcome"),
        help="Envelopes for apps' queues: of a success, or of a failure. Dead letters are among them.",
    ),
    Metric(name="results_waiting", kind="gauge", labels=("app",), help="Tasks whose envelope no server has yet."),
)

#: By name.
BY_NAME = {metric.name: metric for metric in METRICS}
