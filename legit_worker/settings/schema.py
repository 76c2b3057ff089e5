"""Which settings there are: `Settings`, and the groups of each app and each worker. `model.py` has a model's group.

In: a variable's text, or a value of the TOML file. Out: frozen objects that were checked, or pydantic's error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from legit_worker.settings.amounts import Amount
from legit_worker.settings.model import Group, ModelSettings
from legit_worker.settings.values import (
    FORMATS,
    AppName,
    AppSource,
    AppSources,
    BuiltInTask,
    Bytes,
    Count,
    DeviceName,
    Folder,
    Folders,
    Formats,
    Headroom,
    Hosts,
    Key,
    ModelAliases,
    Networks,
    Pixels,
    QueueName,
    QueuePattern,
    SafeName,
    Seconds,
    ServerUrl,
    Some,
    SomeBytes,
    SomeMemory,
    SomeSeconds,
    TaskAliases,
    TaskRate,
    fold,
    no_switch,
    nothing_if,
    spelled,
)

#: The settings that bound what a task may bring. An app without its own takes them from all apps.
LIMITS = ("max_items", "max_characters", "max_image_bytes", "max_pixels", "max_task_pixels", "image_formats")


class AppSettings(Group):
    """One app: `LEGIT_WORKER_APPS__<APP>__…`."""

    #: Whether its results also go to its own queue.
    result_routing: bool = False
    #: The app's queue; `<app>.results` if it is not set.
    queue: QueueName | None = None
    #: The form of a result on the app's queue.
    format: Literal["json", "celery", "laravel"] = "json"
    #: The Celery task or the Laravel job that handles a result on the app's side. Formats `celery` and `laravel` need
    #: it.
    job: str | None = Field(default=None, validate_default=True)
    #: The server of the app's queue; the broker if it is not set. It may hold a password, so no message shows it.
    url: ServerUrl = Field(default=None, repr=False)
    #: What stands before the queue's name in Redis.
    prefix: str = ""
    #: How arrays of floats are written.
    encoding: Literal["json", "base64"] = "json"
    #: A message's `reply_to` names the queue if it begins like this, and if `APP_FROM` has `reply_to`. If it is not
    #: set, no message names a queue.
    reply_to_prefix: SafeName | None = None
    #: The most entries of its queue, after which its results wait; 0 sets no bound. If it is not set, the bound of all
    #: apps holds.
    queue_max_length: Count | None = None
    #: Seconds after which a result leaves its queue unread. 0 and no value mean the same as for `QUEUE_MAX_LENGTH`.
    queue_max_seconds: Seconds | None = None
    #: The most dead letters of this app, after which the oldest go. 0 and no value mean the same.
    dead_max_length: Count | None = None
    #: Seconds after which a dead letter of this app goes. 0 and no value mean the same.
    dead_max_seconds: Seconds | None = None
    #: Whether its tasks share batches; otherwise each task runs alone and to its end, as under Celery's solo pool.
    batching: bool = True
    #: Its share of a busy device, relative to the other apps'.
    weight: float = Field(default=1.0, gt=0)
    #: The aliases of the models that it may use; all if it is not set. Other workers may serve some of these.
    models: ModelAliases | None = None
    #: What one of its tasks may bring. If it is not set, the limit of all apps holds.
    max_items: Some | None = None
    max_characters: Some | None = None
    max_image_bytes: SomeBytes | None = None
    max_pixels: Pixels | None = None
    max_task_pixels: Some | None = None
    image_formats: Formats | None = None
    #: The most of its tasks that one worker runs at once. Others wait in the worker, and hold up no other app's tasks.
    max_in_flight: Some | None = None
    #: How many of its tasks may begin in one worker in a second, a minute or an hour: `100/s`, `30/m`, `5/h`. Others
    #: wait in the worker, and hold up no other app's tasks.
    rate: TaskRate | None = None

    @field_validator("job")
    @classmethod
    def _is_named(cls, job: str | None, info: ValidationInfo) -> str | None:
        chosen = info.data.get("format")
        if not job and chosen != "json" and info.data.get("result_routing"):
            raise ValueError(f"format {chosen!r} needs a job: the task's or the Laravel job's name")
        return job


class WorkerSettings(Group):
    """One worker, by the part of its name before the `@`: `LEGIT_WORKER_WORKERS__<NODE>__…`."""

    #: The device that its models run on; `LEGIT_WORKER_DEVICE` if it is not set.
    device: DeviceName | None = None
    #: The aliases of its models; all if it is not set. If it is set, and the command has no `-Q`, the worker takes
    #: tasks from the queues of these models and from the default queue.
    models: ModelAliases | None = None


def _aliased_once(tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Refuse one name for two tasks."""
    owners: dict[str, str] = {}
    for task, aliases in tasks.items():
        for alias in aliases:
            if owners.setdefault(alias, task) != task:
                both = [spelled(("tasks", owner)) for owner in (owners[alias], task)]
                raise ValueError(f"{alias!r} can't be in both {' and '.join(both)}")
    return tasks


def _told_apart(models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
    """Refuse two aliases that a task could not tell apart."""
    owners: dict[str, str] = {}
    for alias in models:
        if owners.setdefault(fold(alias), alias) != alias:
            raise ValueError(
                f"{owners[fold(alias)]!r} and {alias!r} are one name, since - . / count as _ there: rename one"
            )
    return models


class Settings(BaseSettings):
    """All settings. `load` makes them; the class itself reads neither environment nor file."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    _no_switch = field_validator("*", mode="before")(no_switch)

    #: Whether the worker's pool is swapped; otherwise the worker is stock Celery. `celery -A legit_worker` has 1.
    enabled: bool = False
    #: Whether this worker runs models, or prepares their input without ever touching CUDA.
    role: Literal["device", "prep"] = "device"
    #: By alias, in lower case. A task may use any name that `fold` makes the same.
    models: Annotated[dict[Key, ModelSettings], AfterValidator(_told_apart)] = Field(default_factory=dict)
    #: The device that models run on: `auto`, `cpu`, `cuda`, `cuda:N`, `simulated`, or a GPU's UUID: `GPU-…`, `MIG-…`.
    device: DeviceName = "auto"
    #: By the part of a worker's name before the `@`: what differs among workers that share these settings.
    workers: dict[AppName, WorkerSettings] = Field(default_factory=dict)
    #: Which of `workers` this process is. A worker takes it from its own name.
    node: AppName | None = None
    #: How the queue of each model is named, with `{model}` in place of its alias.
    model_queues: QueuePattern = "legit.{model}"
    #: Device memory to leave free: `4GiB`, or a share.
    vram_headroom: Headroom = Amount(10, "%")
    #: The most device memory to take: `4GiB`, or a share. If it is not set, all but the headroom.
    vram_limit: SomeMemory | None = None
    #: The folder in which workers of one GPU meet, to load one after the other; a folder of the user's own if it is not
    #: set.
    lock_dir: Folder | None = None
    #: The folder for what can be made anew, such as converted models; `~/.cache/legit_worker` if it is not set.
    cache_dir: Folder | None = None
    #: The most of the host's memory for weights that have left the device, such as `16GiB`.
    host_cache: Bytes = Amount(0)
    #: The most tasks in flight. If it is not set, the pool's measured default.
    window: int | None = Field(default=None, ge=1, le=100_000)
    #: Predicted seconds of work that this worker may hold; the rest stays in the queue, for others. If it is not set,
    #: the pool's measured default.
    max_held_seconds: SomeSeconds | None = None
    #: Bytes of the messages that this worker may hold, and one more message. Images that come as base64 are most of
    #: them. What a worker makes of a message comes on top: its file, and a picture of the model's size.
    max_held_bytes: Bytes = Amount(512, "MiB")
    #: How often a message is delivered to workers that die before it is done; 0 sets no bound.
    max_deliveries: int = Field(default=5, ge=0, le=1000)
    #: Seconds within which a dead worker's messages are given to others, on Redis.
    lease_seconds: Annotated[float, Field(ge=1, le=86_400)] = 30.0
    #: The most seconds that a task waits for company; with `auto`, the worker decides.
    max_queue_delay: Annotated[Seconds | None, nothing_if("auto")] = None
    #: Seconds within which 99 of 100 tasks should be done; `off` sets no target.
    target_latency: Annotated[SomeSeconds | None, nothing_if("off")] = None
    #: The most seconds that a task waits in all, after which it fails; `off` sets no bound.
    max_wait_seconds: Annotated[SomeSeconds | None, nothing_if("off")] = None
    #: The most seconds that one batch should take. A model's first batch, a single item and two launches may take
    #: longer.
    max_batch_seconds: SomeSeconds = 0.5
    #: The number of helper processes that prepare input beside the worker.
    prep_processes: int = Field(default=0, ge=0, le=1024)
    #: The most seconds that a helper takes for one input.
    prep_seconds: SomeSeconds = 30.0
    #: Folders that `prep_image` may read files from.
    prep_roots: Folders = ()
    #: Hosts that `prep_image` may fetch from.
    prep_hosts: Hosts = ()
    #: Private networks, as `10.0.0.0/8`, that a host of `prep_hosts` may be in.
    prep_private: Networks = ()
    #: Other names of a built-in task, as JSON: for each name, the built-in's name for each of the caller's arguments,
    #: or `null` to drop the argument.
    tasks: Annotated[dict[BuiltInTask, TaskAliases], AfterValidator(_aliased_once)] = Field(default_factory=dict)
    #: The most entries of each app's queue, after which the app's results wait; 0 sets no bound.
    queue_max_length: Count = 0
    #: Seconds after which a result leaves its app's queue unread; 0 sets no bound.
    queue_max_seconds: Seconds = 0.0
    #: The most dead letters of each app, after which its oldest go; 0 sets no bound.
    dead_max_length: Count = 0
    #: Seconds after which a dead letter of an app goes; 0 sets no bound.
    dead_max_seconds: Seconds = 0.0
    #: The most items in one task. Several smaller tasks are better: they share batches, and a bad item fails its own
    #: task alone.
    max_items: Some = 2048
    #: The most characters in one text: forty times what the longest models take. Tokenizing takes time for each.
    max_characters: Some = 1_000_000
    #: The most bytes in one image's file.
    max_image_bytes: SomeBytes = Amount(32, "MiB")
    #: The most pixels in one image, as a large camera has. A file of half a megabyte can hold a hundred times as many.
    max_pixels: Pixels = 64_000_000
    #: The most pixels in all images of one task: some twenty seconds of decoding.
    max_task_pixels: Some = 1_000_000_000
    #: The formats that an image may have.
    image_formats: Formats = FORMATS[:6]
    #: By app, in lower case.
    apps: dict[AppName, AppSettings] = Field(default_factory=dict)
    #: The models that tasks may use that name no app of the settings; all if it is not set, and `none` is none.
    no_app_models: Annotated[ModelAliases | None, nothing_if("none", ())] = None
    #: Where a task says which app it is for; the first that names one counts: `header:<name>`, `kwarg:<name>`,
    #: `queue:<regex with (?P<app>…)>`, `reply_to`.
    app_from: AppSources = (AppSource("header", "app"), AppSource("kwarg", "app"))
    #: The most bytes of one routed envelope; a larger result is routed as a failure that says so.
    result_max_bytes: SomeBytes = Amount(16, "MiB")
    #: The worker tries to deliver an envelope for this many seconds before the envelope is a dead letter.
    result_retry_seconds: Seconds = 300.0
    #: A task may hold the main thread for this many seconds while others wait, before the log says so.
    stall_seconds: SomeSeconds = 5.0
    #: The port of Prometheus metrics and health; 0 is any free one, and `off` serves neither.
    metrics_port: Annotated[Annotated[int, Field(ge=0, le=65535)] | None, nothing_if("off")] = None
    #: How the log's lines are written: as Celery writes them, or one JSON object for each.
    log: Literal["text", "json"] = "text"

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only the given values: `load` reads environment and file, so that an error can name the place."""
        return (init_settings,)


#: The groups of which each alias or app has one.
GROUPS: Mapping[str, type[Group]] = {"models": ModelSettings, "apps": AppSettings, "workers": WorkerSettings}
