"""Which settings there are, and what each may hold: `Settings`, and the groups of each model and each app.

In: a variable's text, or a value of the TOML file. Out: frozen objects that were checked, or pydantic's error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "LEGIT_WORKER_"

#: Stands between the parts of a variable's name.
DELIMITER = "__"

#: The built-in tasks that can have other names as well.
BUILT_IN_TASKS = ("embed_text", "embed_image", "rerank", "prep_text", "prep_image")

#: The kinds of model that are read from a path.
KINDS_WITH_PATH = ("embed", "rerank", "sparse", "image")

#: Bytes in one of each unit that an amount of memory can be written in.
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

#: The form of an app's or a queue's name.
NAME = r"[A-Za-z0-9_.:-]{1,128}"

#: The form of an amount. Fifteen digits are a petabyte, and a float holds them exactly.
_AMOUNT = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(%|[a-z]*)\s*", re.IGNORECASE)

#: Characters that an alias may have and that a shell does not allow in a variable's name: a variable has `_` instead.
_UNSPELLABLE = re.compile(r"[-./]")

#: Commas between app sources. A comma inside a queue's regex isn't followed by the start of another source.
_BETWEEN_SOURCES = re.compile(r",\s*(?=(?:header|kwarg|queue):|reply_to\s*(?:,|$))")


@dataclass(frozen=True)
class Amount:
    """An amount of memory: a number of bytes, or a share of the whole."""

    #: As it was written: 4 in `4GiB`, 10 in `10%`.
    number: float
    #: `%`, or a key of `UNITS`.
    unit: str = "B"

    def __str__(self) -> str:
        return f"{self.number:.15g}{self.unit}"

    def of(self, total_bytes: int) -> int:
        """Return bytes, on a device that has `total_bytes`. An amount in bytes may exceed the total."""
        if self.unit == "%":
            return int(total_bytes * self.number / 100)
        return int(self.number * UNITS[self.unit])

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read an amount written as `10%`, `4GiB`, `512 MiB` or `1000000`. Raises `ValueError`."""
        found = _AMOUNT.fullmatch(text)
        units = {unit.lower(): unit for unit in (*UNITS, "%")}
        unit = units.get((found[2] or "B").lower()) if found else None
        if found is None or unit is None:
            raise ValueError(f"should be bytes, a number with {', '.join(UNITS)}, or a share such as 10%")
        amount = cls(float(found[1]), unit)
        if unit == "%" and amount.number > 100:
            raise ValueError(f"{amount} is more than all there is: give at most 100%")
        return amount


@dataclass(frozen=True)
class AppSource:
    """One place to look for the name of the app that a task is for."""

    #: Where to look.
    kind: Literal["header", "kwarg", "queue", "reply_to"]
    #: The header's or keyword argument's name; for `queue`, a regex whose group `app` is the app; else empty.
    value: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}" if self.value else self.kind

    @classmethod
    def parse(cls, text: str) -> AppSource:
        """Read a source written as `header:app`, `kwarg:app`, `queue:<regex>` or `reply_to`. Raises `ValueError`."""
        kind, _, value = text.strip().partition(":")
        if kind == "reply_to" and not value:
            return cls("reply_to")
        if kind == "header" and value:
            return cls("header", value)
        if kind == "kwarg" and value:
            return cls("kwarg", value)
        if kind == "queue" and value:
            return cls("queue", _with_app_group(value))
        raise ValueError(f"{text!r} should be header:<name>, kwarg:<name>, queue:<regex with (?P<app>…)> or reply_to")


def _with_app_group(pattern: str) -> str:
    """Return the pattern unchanged. Raises `ValueError` if it can't name an app."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"queue:{pattern} is not a regular expression: {error}") from None
    if "app" not in groups:
        raise ValueError(f"queue:{pattern} has no group (?P<app>…): the app's name must match such a group")
    return pattern


def _matching(pattern: str, meaning: str) -> AfterValidator:
    """Check that the whole string matches; the error says `meaning`."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"should be {meaning}")
        return value

    return AfterValidator(check)


def nothing_if(word: str) -> BeforeValidator:
    """Read this word as None."""
    return BeforeValidator(lambda value: None if isinstance(value, str) and value.lower() == word else value)


def _in_bytes(amount: Amount) -> Amount:
    """Refuse a share, since there is no whole to take it of."""
    if amount.unit == "%":
        raise ValueError(f"should be bytes, such as 16MiB, and not a share such as {amount}")
    return amount


def listed(value: Any, separator: str | re.Pattern[str] = ",") -> Any:
    """Split a string: JSON if it starts like JSON, else at the separators. Other values stay as they are."""
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from None
    return [part.strip() for part in re.split(separator, value) if part.strip()]


def _sources(value: Any) -> Any:
    """Read each string of a list as an `AppSource`."""
    value = listed(value, _BETWEEN_SOURCES)
    if not isinstance(value, list):
        return value
    return tuple(AppSource.parse(source) if isinstance(source, str) else source for source in value)


def _renames_by_alias(value: Any) -> Any:
    """Read aliases in any of their spellings as `{alias: renames}`."""
    value = listed(value)
    if isinstance(value, Mapping):
        return {alias: {} if renames is None else renames for alias, renames in value.items()}
    if isinstance(value, list) and all(isinstance(alias, str) for alias in value):
        return {alias: {} for alias in value}
    raise ValueError('should be a task\'s name, a list of names, or {name: {"caller\'s argument": "built-in\'s"}}')


def fold(alias: str) -> str:
    """Reduce an alias to what tells models apart: `text-embedding-3` and `Text_Embedding_3` are one name."""
    return _UNSPELLABLE.sub("_", alias.lower())


#: A name that is part of a variable's name. Variables are often upper case, so case doesn't count.
Key = Annotated[str, StringConstraints(to_lower=True, min_length=1)]
SafeName = Annotated[str, _matching(NAME, "1 to 128 of the characters A-Z a-z 0-9 _ . : -")]
AppName = Annotated[SafeName, StringConstraints(to_lower=True)]
ModelAliases = Annotated[tuple[Key, ...], BeforeValidator(listed)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(listed)]
AppSources = Annotated[tuple[AppSource, ...], BeforeValidator(_sources)]
Kind = Annotated[
    str,
    _matching(
        rf"{'|'.join(KINDS_WITH_PATH)}|simulated|[^\W\d][\w.]*:[^\W\d][\w.]*",
        f"{', '.join(KINDS_WITH_PATH)}, simulated, or a class of your own as module:Class",
    ),
]
DeviceName = Annotated[str, _matching(r"auto|cpu|cuda(:[0-9]+)?|simulated", "auto, cpu, cuda, cuda:N or simulated")]
Memory = Annotated[
    Amount,
    BeforeValidator(lambda value: Amount.parse(str(value)) if isinstance(value, str | int | float) else value),
]
Bytes = Annotated[Memory, AfterValidator(_in_bytes)]
BuiltInTask = Annotated[str, _matching("|".join(BUILT_IN_TASKS), f"one of {', '.join(BUILT_IN_TASKS)}")]
TaskAliases = Annotated[
    dict[Annotated[str, StringConstraints(min_length=1)], dict[str, str | None]], BeforeValidator(_renames_by_alias)
]
Seconds = Annotated[float, Field(ge=0)]
SomeSeconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


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
    """One app: `LEGIT_WORKER_APPS__<APP>__…`."""

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
    #: The most entries of its queue, after which its results wait; 0 sets no bound, None takes the one of all apps.
    queue_max_length: Count | None = None
    #: Seconds after which a result leaves its queue unread; 0 and None likewise.
    queue_max_seconds: Seconds | None = None
    #: The most dead letters of this app, after which the oldest go; 0 and None likewise.
    dead_max_length: Count | None = None
    #: Seconds after which a dead letter of this app goes; 0 and None likewise.
    dead_max_seconds: Seconds | None = None
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

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

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
    #: The folder in which workers of one GPU meet, to load one after the other; None is a folder of the user's own.
    lock_dir: Path | None = None
    #: The most of the host's memory for weights that have left the device.
    host_cache: Bytes = Amount(0)
    #: Tasks in flight; None is the pool's measured default.
    window: int | None = Field(default=None, ge=1, le=100_000)
    #: Predicted seconds of work that this worker may hold; None is the pool's measured default.
    max_held_seconds: SomeSeconds | None = None
    #: How often a message is delivered to workers that die before it is done; 0 is no bound.
    max_deliveries: int = Field(default=5, ge=0, le=1000)
    #: Seconds within which a dead worker's messages are given to others.
    lease_seconds: Annotated[float, Field(ge=1, le=86_400)] = 30.0
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
    #: The bounds of each app's queue and dead letters, unless the app has its own; 0 sets no bound.
    queue_max_length: Count = 0
    queue_max_seconds: Seconds = 0.0
    dead_max_length: Count = 0
    dead_max_seconds: Seconds = 0.0
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
