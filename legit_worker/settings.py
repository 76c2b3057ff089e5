"""What the operator chose.

In: `LEGIT_WORKER_*` variables, and the TOML file that `LEGIT_WORKER_CONFIG` names; a variable beats the file. Out: a
frozen `Settings`, or a `SettingsError` that names every variable that is wrong. Nothing here imports Celery, and
nothing reads a device: a process that only looks at its settings never opens a CUDA context.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from legit_worker.errors import SettingsError

PREFIX = "LEGIT_WORKER_"

#: Stands between the parts of a variable's name.
DELIMITER = "__"

#: The built-in tasks that can have other names as well.
BUILT_IN_TASKS = ("embed_text", "embed_image", "rerank", "prep_text", "prep_image")

#: The kinds of model that are read from a path.
KINDS_WITH_PATH = ("embed", "rerank", "sparse", "image")

#: Bytes in one of each unit that an amount of memory can be written in.
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

#: What an app's or a queue's name looks like.
NAME = r"[A-Za-z0-9_.:-]{1,128}"

#: What an amount looks like. Fifteen digits are a petabyte, and a float holds them exactly.
_AMOUNT = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(%|[a-z]*)\s*", re.IGNORECASE)

#: What Kubernetes sets for a service whose name begins with `legit-worker`. They are no settings.
_OF_A_SERVICE = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)")

#: And the one of them whose name alone does not tell: `legit-worker-metrics` has a `LEGIT_WORKER_METRICS_PORT`, too.
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://.*")

#: What a variable's name can't hold in a shell, and an alias may: in a variable, each is written as `_`.
_UNSPELLABLE = re.compile(r"[-./]")

#: Commas between app sources. Those inside a queue's regex aren't followed by the start of another source.
_BETWEEN_SOURCES = re.compile(r",\s*(?=(?:header|kwarg|queue):|reply_to\s*(?:,|$))")

#: The parts of a setting's name, in lower case: `("models", "minilm", "path")`.
Name = tuple[str, ...]

CONFIG: Name = ("config",)
ENABLED: Name = ("enabled",)
ROLE: Name = ("role",)


@dataclass(frozen=True)
class Amount:
    """An amount of device memory: so many bytes, or a share of all there is."""

    #: As it was written: 4 in `4GiB`, 10 in `10%`.
    number: float
    #: `%`, or a key of `UNITS`.
    unit: str = "B"

    def __str__(self) -> str:
        return f"{self.number:.15g}{self.unit}"

    def of(self, total_bytes: int) -> int:
        """Bytes, on a device that has `total_bytes`. More than it has, where bytes were asked for, stays more."""
        if self.unit == "%":
            return int(total_bytes * self.number / 100)
        return int(self.number * UNITS[self.unit])

    @classmethod
    def parse(cls, text: str) -> Amount:
        """The amount written as `10%`, `4GiB`, `512 MiB` or `1000000`. Raises `ValueError`."""
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

    @classmethod
    def parse(cls, text: str) -> AppSource:
        """The source written as `header:app`, `kwarg:app`, `queue:<regex>` or `reply_to`. Raises `ValueError`."""
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
    """The pattern as it is. Raises `ValueError` where it can't name an app."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"queue:{pattern} is not a regular expression: {error}") from None
    if "app" not in groups:
        raise ValueError(f"queue:{pattern} has no group (?P<app>…), which is to match the app's name")
    return pattern


def _matching(pattern: str, meaning: str) -> AfterValidator:
    """A check that a whole string matches; `meaning` says in words what does."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"should be {meaning}")
        return value

    return AfterValidator(check)


def _nothing_if(word: str) -> BeforeValidator:
    """Has a field's None be written as a word."""
    return BeforeValidator(lambda value: None if isinstance(value, str) and value.lower() == word else value)


def _in_bytes(amount: Amount) -> Amount:
    """Refuses a share: there is nothing that it could be of."""
    if amount.unit == "%":
        raise ValueError(f"should be bytes, such as 16MiB, and not a share such as {amount}")
    return amount


def _listed(value: Any, separator: str | re.Pattern[str] = ",") -> Any:
    """What a string holds: JSON if it starts like it, else parts between separators. Other values as they are."""
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from None
    return [part.strip() for part in re.split(separator, value) if part.strip()]


def _sources(value: Any) -> Any:
    """Each string of a list as an `AppSource`."""
    value = _listed(value, _BETWEEN_SOURCES)
    if not isinstance(value, list):
        return value
    return tuple(AppSource.parse(source) if isinstance(source, str) else source for source in value)


def _renames_by_alias(value: Any) -> Any:
    """Aliases in any of their spellings as `{alias: renames}`."""
    value = _listed(value)
    if isinstance(value, Mapping):
        return {alias: {} if renames is None else renames for alias, renames in value.items()}
    if isinstance(value, list) and all(isinstance(alias, str) for alias in value):
        return {alias: {} for alias in value}
    raise ValueError('should be a task\'s name, a list of names, or {name: {"caller\'s argument": "built-in\'s"}}')


def _aliased_once(tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Refuses one name for two tasks."""
    owners: dict[str, str] = {}
    for task, aliases in tasks.items():
        for alias in aliases:
            if owners.setdefault(alias, task) != task:
                both = [_spelled(("tasks", owner)) for owner in (owners[alias], task)]
                raise ValueError(f"{alias!r} can't be in both {' and '.join(both)}")
    return tasks


def fold(alias: str) -> str:
    """What tells models apart when one is named: `text-embedding-3`, `Text_Embedding_3` are one name."""
    return _UNSPELLABLE.sub("_", alias.lower())


def _told_apart(models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
    """Refuses two aliases that a task could not tell apart."""
    owners: dict[str, str] = {}
    for alias in models:
        if owners.setdefault(fold(alias), alias) != alias:
            raise ValueError(
                f"{owners[fold(alias)]!r} and {alias!r} are one name, since - . / count as _ there: rename one"
            )
    return models


#: A name that is part of a variable's name. Variables are often upper case, so case doesn't count.
Key = Annotated[str, StringConstraints(to_lower=True, min_length=1)]
SafeName = Annotated[str, _matching(NAME, "1 to 128 of the characters A-Z a-z 0-9 _ . : -")]
AppName = Annotated[SafeName, StringConstraints(to_lower=True)]
ModelAliases = Annotated[tuple[Key, ...], BeforeValidator(_listed)]
Kind = Annotated[
    str,
    _matching(
        r"embed|rerank|sparse|image|simulated|[^\W\d][\w.]*:[^\W\d][\w.]*",
        "embed, rerank, sparse, image, simulated, or a class of your own as module:Class",
    ),
]
DeviceName = Annotated[str, _matching(r"auto|cpu|cuda(:[0-9]+)?|simulated", "auto, cpu, cuda, cuda:N or simulated")]
Memory = Annotated[
    Amount,
    BeforeValidator(lambda value: Amount.parse(str(value)) if isinstance(value, str | int | float) else value),
]
BuiltInTask = Annotated[str, _matching("|".join(BUILT_IN_TASKS), f"one of {', '.join(BUILT_IN_TASKS)}")]
TaskAliases = Annotated[
    dict[Annotated[str, StringConstraints(min_length=1)], dict[str, str | None]], BeforeValidator(_renames_by_alias)
]
Seconds = Annotated[float, Field(ge=0)]


class _Group(BaseModel):
    """Settings that belong to one alias or one app."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class ModelSettings(_Group):
    """One model: `LEGIT_WORKER_MODELS__<ALIAS>__…`."""

    #: What kind of model it is: a built-in kind, or a class of the user's own as `module:Class`.
    kind: Kind = "embed"
    #: A folder, or a name on the Hugging Face Hub. Kinds that need none may give it a meaning of their own.
    path: str | None = Field(default=None, validate_default=True)
    #: Whether to load it at start and never evict it.
    pin: bool = False
    #: Seconds without a call after which it may be evicted; None keeps it for as long as nothing needs its room.
    keep_alive: Seconds | None = None
    #: Of its weights; None is as the model's files have them. `tf32`: float32, whose products a GPU rounds to TF32.
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
    #: That queue; None is `<app>.results`.
    queue: SafeName | None = None
    #: How a result is wrapped for it.
    format: Literal["json", "celery", "laravel"] = "json"
    #: What handles a result on the other side: a Celery task's name, or a Laravel job's.
    job: str | None = Field(default=None, validate_default=True)
    #: The server of that queue; None is the broker. May hold a password, so it is shown nowhere.
    url: str | None = Field(default=None, repr=False)
    #: Goes before the queue's name in Redis.
    prefix: str = ""
    #: How arrays of floats are written.
    encoding: Literal["json", "base64"] = "json"
    #: What a message's `reply_to` must begin with to name the queue itself; None lets no message name one.
    reply_to_prefix: SafeName | None = None
    #: Whether its tasks share batches; otherwise each runs as under Celery's solo pool, alone and to its end.
    batching: bool = True
    #: Its share of a busy device, relative to the other apps'.
    weight: float = Field(default=1.0, gt=0)
    #: The aliases of the models it may use; None is all. They may be other workers' models.
    models: ModelAliases | None = None

    @field_validator("job")
    @classmethod
    def _is_named(cls, job: str | None, info: ValidationInfo) -> str | None:
        chosen = info.data.get("format")
        if not job and chosen != "json" and info.data.get("result_routing"):
            raise ValueError(f"format {chosen!r} needs a job: the task's or the Laravel job's name")
        return job


class Settings(BaseSettings):
    """All settings. Made by `load`; made directly it takes what it is given, and reads nothing."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    #: Whether the worker's pool is swapped; otherwise everything is stock Celery.
    enabled: bool = False
    #: What this worker does: run models, or prepare their input without ever touching CUDA.
    role: Literal["device", "prep"] = "device"
    #: By alias, in lower case. Any name that folds to the same means the model, too: see `fold`.
    models: Annotated[dict[Key, ModelSettings], AfterValidator(_told_apart)] = Field(default_factory=dict)
    #: Where models run.
    device: DeviceName = "auto"
    #: Device memory to leave free.
    vram_headroom: Memory = Amount(10, "%")
    #: The most device memory to take; None is all but the headroom.
    vram_limit: Memory | None = None
    #: The most of the host's memory that weights may take that have left the device.
    host_cache: Annotated[Memory, AfterValidator(_in_bytes)] = Amount(0)
    #: Tasks in flight; None is the pool's measured default.
    window: int | None = Field(default=None, ge=1, le=100_000)
    #: Predicted seconds of work that this worker may hold; None is the pool's measured default.
    max_held_seconds: float | None = Field(default=None, gt=0)
    #: The longest, in seconds, that a task waits for company; None lets the pool decide.
    max_queue_delay: Annotated[Seconds | None, _nothing_if("auto")] = None
    #: The longest, in seconds, that a task waits in all, for whatever; None is any time.
    max_wait_seconds: Annotated[Annotated[float, Field(gt=0)] | None, _nothing_if("off")] = None
    #: The longest, in seconds, that one forward should take.
    max_batch_seconds: float = Field(default=0.5, gt=0)
    #: Helper processes that prepare input beside the worker.
    prep_processes: int = Field(default=0, ge=0)
    #: Seconds that a helper may take over one input.
    prep_seconds: float = Field(default=30.0, gt=0)
    #: Folders that images may be read from by their path; none by default.
    prep_roots: Annotated[tuple[Path, ...], BeforeValidator(_listed)] = ()
    #: Hosts that images may be fetched from; none by default.
    prep_hosts: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    #: Private networks, as `10.0.0.0/8`, that those hosts may be in.
    prep_private: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    #: By built-in task and then alias: what each of the caller's arguments is called by the built-in, None to drop it.
    tasks: Annotated[dict[BuiltInTask, TaskAliases], AfterValidator(_aliased_once)] = Field(default_factory=dict)
    #: By app, in lower case.
    apps: dict[AppName, AppSettings] = Field(default_factory=dict)
    #: Where a task says which app it is for; the first that names one counts.
    app_from: Annotated[tuple[AppSource, ...], BeforeValidator(_sources)] = (
        AppSource("header", "app"),
        AppSource("kwarg", "app"),
    )
    #: The most bytes of one routed envelope; a larger result is routed as a failure that says so.
    result_max_bytes: Annotated[Memory, AfterValidator(_in_bytes)] = Amount(16, "MiB")
    #: Seconds for which an envelope is tried again before it goes to the dead letters.
    result_retry_seconds: Seconds = 300.0
    #: Seconds for which a task may hold the main thread, while others wait, before the log says so.
    stall_seconds: float = Field(default=5.0, gt=0)
    #: Where Prometheus metrics and health are served; None is nowhere.
    metrics_port: Annotated[Annotated[int, Field(ge=1, le=65535)] | None, _nothing_if("off")] = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what it is given: `load` reads the environment and the file, and can tell which is wrong where."""
        return (init_settings,)


#: The groups of which there is one per alias or app.
_GROUPS: Mapping[str, type[_Group]] = {"models": ModelSettings, "apps": AppSettings}


class Variable(NamedTuple):
    """One environment variable."""

    #: As the environment spells it.
    spelling: str
    #: Its text.
    text: str


class _Environment(EnvSettingsSource):
    """pydantic-settings' own source, on the variables it is given.

    It leaves each text as it is. The validators above know what it may hold, and, as one value, it replaces the
    file's value of the same name instead of mixing with it.
    """

    def __init__(self, given: Mapping[Name, Variable]) -> None:
        super().__init__(Settings)
        self.env_vars = {_spelled(name).lower(): variable.text for name, variable in given.items()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        return value


def load(environ: Mapping[str, str] | None = None, *, enabled_by_default: bool = False) -> Settings:
    """The settings of the given environment, which is the process's own unless another is given.

    Raises `SettingsError`, with one line for each thing that is wrong.
    """
    environ = os.environ if environ is None else environ
    given = _variables(environ)
    problems = unknown(environ)
    given = {name: variable for name, variable in given.items() if _is_setting(name)}
    try:
        file = _read_file(given)
    except (OSError, ValueError) as error:
        problems.append(f"{_shown(given[CONFIG])}: {getattr(error, 'strerror', None) or error}")
        file = {}
    given = {_as_in_file(name, file): variable for name, variable in given.items()}
    tree = _merged(file, _Environment(given)())
    problems += _pathless(environ, tree.get("models"))
    try:
        settings = Settings(**{"enabled": enabled_by_default} | tree)
    except ValidationError as error:
        problems += [_problem(detail, given, file) for detail in error.errors(include_url=False, include_input=False)]
    # Outside the handlers, so that no exception that may hold a password hangs on this one.
    if problems:
        raise SettingsError("\n".join(problems))
    return settings


def load_or_exit() -> Settings:
    """A worker's settings. If they are bad, the process ends with the variable's name instead of a traceback."""
    try:
        return load(enabled_by_default=True)
    except SettingsError as error:
        raise SystemExit(f"legit_worker: {error}") from None


def unknown(environ: Mapping[str, str] | None = None) -> list[str]:
    """One sentence per variable of ours that is no setting."""
    given = _variables(os.environ if environ is None else environ)
    return [
        f"{variable.spelling} is not a setting{_suggestion(name, _spelled)}"
        for name, variable in given.items()
        if not _is_setting(name)
    ]


def is_enabled(environ: Mapping[str, str] | None = None, *, default: bool = False) -> bool:
    """Whether the worker is to be ours: as `LEGIT_WORKER_ENABLED` says, else if it is a prep worker. Never raises.

    A value that can't be understood counts as yes, and so does a file that can't be read and could have said yes: then
    the worker stops at its start, with `load`'s message.
    """
    try:
        choice = _peek(ENABLED, environ)
        return default or is_prep(environ) if choice is None else TypeAdapter(bool).validate_python(choice)
    except (OSError, ValueError):
        return True


def is_prep(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process's worker is to prepare input without ever touching CUDA. Never raises."""
    with suppress(OSError, ValueError):
        return bool(_peek(ROLE, environ) == "prep")
    return False


def _peek(name: Name, environ: Mapping[str, str] | None) -> Any:
    """One setting as it was written, None where it was not, and the others unread. Raises as `_read_file` does."""
    given = _variables(os.environ if environ is None else environ)
    return given[name].text if name in given else _read_file(given).get(name[0])


def not_yet_in_effect(settings: Settings) -> list[str]:
    """One sentence per setting that was changed and that this release does nothing with."""
    names = [
        *_changed(settings, ("metrics_port",)),
    ]
    return [f"{_spelled(name)} is set, and has no effect in this release." for name in names]


def _changed(group: BaseModel, fields: Iterable[str], *parents: str) -> list[Name]:
    """The names of those fields that don't have their default value."""
    defaults = type(group).model_fields
    return [(*parents, field) for field in fields if getattr(group, field) != defaults[field].default]


def _variables(environ: Mapping[str, str]) -> dict[Name, Variable]:
    """All of ours that hold anything. An empty one counts as not set, as composed environments have them."""
    return {
        _name(spelling): Variable(spelling, text)
        for spelling, text in environ.items()
        if spelling.startswith(PREFIX) and text and not _is_of_a_service(spelling, text)
    }


def _name(spelling: str) -> Name:
    return tuple(spelling.removeprefix(PREFIX).lower().split(DELIMITER))


def _is_of_a_service(spelling: str, text: str) -> bool:
    """Whether Kubernetes set it, for a service of ours."""
    name = spelling.removeprefix(PREFIX)
    is_url = name.endswith("PORT") and _SERVICE_URL.fullmatch(text)
    return bool(is_url or _OF_A_SERVICE.fullmatch(name))


def _as_in_file(name: Name, file: Mapping[str, Any]) -> Name:
    """A model's variable, whose name can't spell every alias, by the alias that the file has for it."""
    models = file.get("models")
    if name[0] != "models" or not isinstance(models, dict):
        return name
    return (name[0], next((alias for alias in models if fold(alias) == fold(name[1])), name[1]), *name[2:])


def _pathless(environ: Mapping[str, str], models: Any) -> list[str]:
    """One sentence per model that only an empty path speaks of: it was to be there, and would not be."""
    empty = (spelling for spelling, text in environ.items() if spelling.startswith(PREFIX) and not text)
    known = {fold(alias) for alias in models} if isinstance(models, dict) else set()
    return [
        f"{spelling} is empty: give model {name[1]!r} a folder, or a name on the Hugging Face Hub, or unset it"
        for spelling, name in ((spelling, _name(spelling)) for spelling in empty)
        if len(name) == 3 and name[::2] == ("models", "path") and fold(name[1]) not in known
    ]


def _read_file(given: Mapping[Name, Variable]) -> dict[str, Any]:
    """The TOML file's tree. Raises `OSError` or, where it is not TOML, `ValueError`."""
    if CONFIG not in given:
        return {}
    path = Path(os.path.expanduser(given[CONFIG].text))
    # pydantic-settings takes a file that isn't there for an empty one.
    path.open("rb").close()
    tree = TomlConfigSettingsSource(Settings, toml_file=path)()
    return {key: _lower_keys(value) if key in _GROUPS else value for key, value in tree.items()}


def _lower_keys(value: Any) -> Any:
    """A table with its keys in lower case, as the variables' are, so that they can meet."""
    return {key.lower(): inner for key, inner in value.items()} if isinstance(value, dict) else value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees in one; where they differ, `above` counts."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merged(below[key], above[key])
    return merged


def _settings_near(name: Name) -> list[Name]:
    """Every setting there is, with the alias or app that `name` has."""
    owner = name[1] if len(name) > 1 and name[1] else "<name>"
    return [
        CONFIG,
        *((field,) for field in Settings.model_fields if field not in (*_GROUPS, "tasks")),
        *(("tasks", task) for task in BUILT_IN_TASKS),
        *((group, owner, field) for group, model in _GROUPS.items() for field in model.model_fields),
    ]


def _is_setting(name: Name) -> bool:
    return name in _settings_near(name)


def _suggestion(name: Name, spell: Callable[[Name], str]) -> str:
    """Which setting may have been meant, where one is close."""
    near = {".".join(setting): setting for setting in _settings_near(name)}
    close = difflib.get_close_matches(".".join(name), near, n=1)
    return f"; did you mean {spell(near[close[0]])}?" if close else ""


def _problem(detail: Mapping[str, Any], given: Mapping[Name, Variable], file: Mapping[str, Any]) -> str:
    """One of pydantic's complaints as a line that names the variable, or the place in the file."""
    name = tuple(str(part) for part in detail["loc"] if part != "[key]")
    variable = next((given[name[:end]] for end in range(1, len(name) + 1) if name[:end] in given), None)
    if variable is None and _holds(file, name[:2]):
        place = f"{'.'.join(name)} in {given[CONFIG].text}"
    else:
        place = _shown(variable) if variable else _spelled(name)
    if detail["type"] == "extra_forbidden":
        return f"{place} is not a setting{_suggestion(name, '.'.join)}"
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}"


def _holds(tree: Any, name: Name) -> bool:
    """Whether the tree has something of this name."""
    for part in name:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _shown(variable: Variable) -> str:
    """`NAME='text'`, without the text where it is a URL, which may hold a password."""
    spelling, text = variable
    return spelling if spelling.upper().endswith("URL") else f"{spelling}={text!r}"


def _spelled(name: Name) -> str:
    """The variable of this name."""
    return PREFIX + DELIMITER.join(name).upper()


def path_variable(alias: str) -> str:
    """The variable that configures a model of this alias, as a shell takes it."""
    return _spelled(("models", fold(alias), "path"))
