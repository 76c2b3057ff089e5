"""Which settings there are: `Settings`, and the groups of each model and each app.

In: values. Out: frozen objects that were checked; the names of the variables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from legit_worker.settings.values import (
    KINDS_WITH_PATH,
    Amount,
    AppName,
    AppSource,
    AppSources,
    BuiltInTask,
    Bytes,
    DeviceName,
    Folders,
    Key,
    Kind,
    Memory,
    ModelAliases,
    Names,
    SafeName,
    Seconds,
    SomeSeconds,
    TaskAliases,
    fold,
    nothing_if,
)

PREFIX = "LEGIT_WORKER_"

#: Stands between the parts of a variable's name.
DELIMITER = "__"

#: The parts of a setting's name, in lower case: `("models", "minilm", "path")`.
Name = tuple[str, ...]


def spelled(name: Name) -> str:
    """Return the variable of this name."""
    return PREFIX + DELIMITER.join(name).upper()


def path_variable(alias: str) -> str:
    """Return the variable that configures a model of this alias, as a shell takes it."""
    return spelled(("models", fold(alias), "path"))


class _Group(BaseModel):
    """The settings of one alias or one app."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class ModelSettings(_Group):
    """One model: `LEGIT_WORKER_MODELS__<ALIAS>__…`."""

    #: What kind of model it is: a built-in kind, or a class of the user's own as `module:Class`.
    kind: Kind = "embed"
    #: A folder, or a name on the Hugging Face Hub. Other kinds may give it a meaning of their own.
    path: str | None = Field(default=None, validate_default=True)
    #: Whether to load it at start and never evict it.
    pin: bool = False
    #: Seconds without a call after which it may be evicted; None keeps it until something needs its memory.
    keep_alive: Seconds | None = None
    #: The type of its weights; None takes the files' own. `tf32`: float32, whose products a GPU rounds to TF32.
    dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16"] | None = None
    #: The branch, tag or commit on the Hub; None is the newest.
    revision: str | None = None

    @field_validator("path")
    @classmethod
    def _is_given(cls, path: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("kind")
        if not path and kind in KINDS_WITH_PATH:
            raise ValueError(f"a model of kind {kind!r} needs a path: a folder, or a name on the Hugging Face Hub")
        return path


class AppSettings(_Group):
    """One app whose tasks are told apart: `LEGIT_WORKER_APPS__<APP>__…`."""

    #: Whether its results also go to its own queue.
    result_routing: bool = False
    #: The app's queue; None is `<app>.results`.
    queue: SafeName | None = None
    #: How a result is wrapped for the app.
    format: Literal["json", "celery", "laravel"] = "json"
    #: The Celery task or the Laravel job that handles a result on the app's side.
    job: str | None = Field(default=None, validate_default=True)
    #: The server of the app's queue; None is the broker. It may hold a password, so no message shows it.
    url: str | None = Field(default=None, repr=False)
    #: Precedes the queue's name in Redis.
    prefix: str = ""
    #: How arrays of floats are written.
    encoding: Literal["json", "base64"] = "json"
    #: A message's `reply_to` names the queue if it begins like this; None lets no message name a queue.
    reply_to_prefix: SafeName | None = None
    #: Whether its tasks share batches; otherwise each task runs alone and to its end, as under Celery's solo pool.
    batching: bool = True
    #: Its share of a busy device, relative to the other apps'.
    weight: float = Field(default=1.0, gt=0)
    #: The aliases of the models that it may use; None is all. Other workers may serve some of these.
    models: ModelAliases | None = None

    @field_validator("job")
    @classmethod
    def _is_named(cls, job: str | None, info: ValidationInfo) -> str | None:
        chosen = info.data.get("format")
        if not job and chosen != "json" and info.data.get("result_routing"):
            raise ValueError(f"format {chosen!r} needs a job: the task's or the Laravel job's name")
        return job


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

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    #: Whether the worker's pool is swapped; otherwise the worker is stock Celery.
    enabled: bool = False
    #: Whether this worker runs models, or prepares their input without ever touching CUDA.
    role: Literal["device", "prep"] = "device"
    #: By alias, in lower case. A task may use any name that `fold` makes the same.
    models: Annotated[dict[Key, ModelSettings], AfterValidator(_told_apart)] = Field(default_factory=dict)
    #: The device that models run on.
    device: DeviceName = "auto"
    #: Device memory to leave free.
    vram_headroom: Memory = Amount(10, "%")
    #: The most device memory to take; None is all but the headroom.
    vram_limit: Memory | None = None
    #: The most of the host's memory for weights that have left the device.
    host_cache: Bytes = Amount(0)
    #: Tasks in flight; None is the pool's measured default.
    window: int | None = Field(default=None, ge=1, le=100_000)
    #: Predicted seconds of work that this worker may hold; None is the pool's measured default.
    max_held_seconds: SomeSeconds | None = None
    #: The most seconds that a task waits for company; None lets the pool decide.
    max_queue_delay: Annotated[Seconds | None, nothing_if("auto")] = None
    #: The most seconds that a task waits in all; None sets no bound.
    max_wait_seconds: Annotated[SomeSeconds | None, nothing_if("off")] = None
    #: The most seconds that one forward should take.
    max_batch_seconds: SomeSeconds = 0.5
    #: The number of helper processes that prepare input beside the worker.
    prep_processes: int = Field(default=0, ge=0)
    #: The most seconds that a helper takes for one input.
    prep_seconds: SomeSeconds = 30.0
    #: Folders that images may be read from by their path.
    prep_roots: Folders = ()
    #: Hosts that images may be fetched from.
    prep_hosts: Names = ()
    #: Private networks, as `10.0.0.0/8`, that a host of `prep_hosts` may be in.
    prep_private: Names = ()
    #: By built-in task and then alias: the built-in's name for each of the caller's arguments, None to drop it.
    tasks: Annotated[dict[BuiltInTask, TaskAliases], AfterValidator(_aliased_once)] = Field(default_factory=dict)
    #: By app, in lower case.
    apps: dict[AppName, AppSettings] = Field(default_factory=dict)
    #: Where a task says which app it is for; the first that names one counts.
    app_from: AppSources = (AppSource("header", "app"), AppSource("kwarg", "app"))
    #: The most bytes of one routed envelope; a larger result is routed as a failure that says so.
    result_max_bytes: Bytes = Amount(16, "MiB")
    #: The worker tries to deliver an envelope for this many seconds before the envelope is a dead letter.
    result_retry_seconds: Seconds = 300.0
    #: A task may hold the main thread for this many seconds while others wait, before the log says so.
    stall_seconds: SomeSeconds = 5.0
    #: The port of Prometheus metrics and health; None serves neither.
    metrics_port: Annotated[Annotated[int, Field(ge=1, le=65535)] | None, nothing_if("off")] = None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take only the given values: `load` reads environment and file, so that an error can name the place."""
        return (init_settings,)


#: The groups of which each alias or app has one.
GROUPS: Mapping[str, type[_Group]] = {"models": ModelSettings, "apps": AppSettings}


def not_yet_in_effect(settings: Settings) -> list[str]:
    """Return one sentence for each setting that was changed and has no effect in this release."""
    names = () if settings.metrics_port is None else ("metrics_port",)
    return [f"{spelled((name,))} is set, and has no effect in this release." for name in names]


def changed(group: BaseModel, parents: Name = ()) -> Iterator[str]:
    """Write each setting that differs from its default as `VARIABLE=value`. A URL loses its user and password."""
    for field, value in group:
        name, default = (*parents, field), type(group).model_fields[field].get_default(call_default_factory=True)
        if field in GROUPS and isinstance(value, dict):
            for owner, inner in value.items():
                yield from changed(inner, (*name, fold(owner) if field == "models" else owner))
        elif field == "tasks":
            yield from (f"{spelled((*name, task))}={json.dumps(aliases)}" for task, aliases in value.items())
        elif value != default:
            yield f"{spelled(name)}={_without_login(value) if field == 'url' else _written(value)}"


def listed_changes(settings: Settings) -> str:
    """Write for the log what `changed` finds, without what the rest of a worker's first line says."""
    told = tuple(f"{spelled((name,))}=" for name in ("enabled", "role"))
    return ", ".join(line for line in changed(settings) if not line.startswith(told)) or "the defaults"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _without_login(url: str) -> str:
    """Keep the scheme and the server's address. Keep nothing if it is not clear where the password ends."""
    scheme, separator, rest = url.partition("://")
    login, _, place = rest.rpartition("@")
    is_clear = separator and ":" not in scheme and not {"@", "?"} & set(login)
    return f"{scheme}://{place.partition('?')[0]}" if is_clear else "…"
