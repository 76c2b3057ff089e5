"""How settings are read, from the environment and the file of `LEGIT_WORKER_CONFIG`, and how they are shown.

In: variables, and a file. Out: `Settings`, or a `SettingsError` that names every wrong variable; sentences for the log.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_settings import TomlConfigSettingsSource

from legit_worker.errors import SettingsError
from legit_worker.settings import nodes
from legit_worker.settings.apps import misspelt
from legit_worker.settings.schema import GROUPS, Settings
from legit_worker.settings.values import BUILT_IN_TASKS, DELIMITER, PREFIX, Name, fold, spelled

#: Variables that Kubernetes sets for a service whose name begins with `legit-worker`. They are no settings.
_OF_A_SERVICE = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)")

#: What is said in place of pydantic's words, which leave out what a switch may be.
_SWITCH = "should be 1, on, yes or true, or 0, off, no or false"
_IN_OTHER_WORDS = {"bool_parsing": _SWITCH, "bool_type": _SWITCH}

#: The value tells one more such variable: `legit-worker-metrics` has a `LEGIT_WORKER_METRICS_PORT`, too.
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://.*")

CONFIG: Name = ("config",)
ENABLED: Name = ("enabled",)
ROLE: Name = ("role",)


class Variable(NamedTuple):
    """One environment variable."""

    #: As the environment spells it.
    spelling: str
    #: Its text.
    text: str


def load(
    environ: Mapping[str, str] | None = None, *, enabled_by_default: bool = False, is_whole: bool = False
) -> Settings:
    """Read the settings from this environment, by default the process's own.

    `is_whole` keeps what they say of other workers' models, too.

    Raises `SettingsError`, with one line for each wrong setting.
    """
    environ = os.environ if environ is None else environ
    given = _variables(environ)
    problems = unknown(environ) + _twice(environ)
    given = {name: variable for name, variable in given.items() if _is_setting(name)}
    try:
        file = _read_file(given)
    except (OSError, ValueError) as error:
        problems.append(f"{_shown(given[CONFIG])}: {getattr(error, 'strerror', None) or error}")
        file = {}
    given = {_as_in_file(name, file): variable for name, variable in given.items()}
    tree = _merged(file, _nested(given))
    problems += _pathless(environ, tree.get("models"))
    try:
        settings = Settings(**{"enabled": enabled_by_default} | tree)
    except ValidationError as error:
        problems += [_problem(detail, given, file) for detail in error.errors(include_url=False, include_input=False)]
    else:
        problems += [*misspelt(settings), *nodes.problems(settings)]
    # Raised outside the handlers: pydantic's error may hold a password, and must not become this error's context.
    if problems:
        raise SettingsError("\n".join(problems))
    return settings if is_whole else nodes.of_this_worker(settings)


def load_or_exit() -> Settings:
    """Read a worker's settings. If one is wrong, end the process with its name instead of a traceback."""
    try:
        return load(enabled_by_default=True)
    except SettingsError as error:
        raise SystemExit(f"legit_worker: {error}") from None


def unknown(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return one sentence for each `LEGIT_WORKER_` variable that is no setting."""
    given = _variables(os.environ if environ is None else environ)
    return [
        f"{variable.spelling} is not a setting{_suggestion(name, spelled)}"
        for name, variable in given.items()
        if not _is_setting(name)
    ]


def is_enabled(environ: Mapping[str, str] | None = None, *, default: bool = False) -> bool:
    """Tell whether `install` changes the worker: `LEGIT_WORKER_ENABLED` says so, or it is a prep worker. Never raises.

    A value or a file that can't be read counts as yes: the worker then stops at its start, with `load`'s message.
    """
    try:
        choice = _peek(ENABLED, environ)
        return default or is_prep(environ) if choice is None else TypeAdapter(bool).validate_python(choice)
    except (OSError, ValueError):
        return True


def is_prep(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether this process's worker prepares input and never touches CUDA. Never raises."""
    with suppress(OSError, ValueError):
        return bool(_peek(ROLE, environ) == "prep")
    return False


def _peek(name: Name, environ: Mapping[str, str] | None) -> Any:
    """Return one setting as it was written, or None, without a look at the others. Raises as `_read_file` does."""
    given = _variables(os.environ if environ is None else environ)
    return given[name].text if name in given else _read_file(given).get(name[0])


def _variables(environ: Mapping[str, str]) -> dict[Name, Variable]:
    """Return all `LEGIT_WORKER_` variables. An empty one counts as not set: container tools set such variables."""
    return {
        _name(spelling): Variable(spelling, text)
        for spelling, text in environ.items()
        if spelling.startswith(PREFIX) and text and not _is_of_a_service(spelling, text)
    }


def _twice(environ: Mapping[str, str]) -> list[str]:
    """Return one sentence for each variable that is there in upper and in lower case: nobody knows which one counts."""
    first: dict[Name, str] = {}
    spellings = (spelling for spelling, text in environ.items() if spelling.startswith(PREFIX) and text)
    return [
        f"{first[name]} and {spelling} are one setting, since upper and lower case count as one: unset one of them"
        for name, spelling in ((_name(spelling), spelling) for spelling in spellings)
        if first.setdefault(name, spelling) != spelling
    ]


def _name(spelling: str) -> Name:
    return tuple(spelling.removeprefix(PREFIX).lower().split(DELIMITER))


def _is_of_a_service(spelling: str, text: str) -> bool:
    """Tell whether Kubernetes set the variable, for a service of this name."""
    name = spelling.removeprefix(PREFIX)
    is_url = name.endswith("PORT") and _SERVICE_URL.fullmatch(text)
    return bool(is_url or _OF_A_SERVICE.fullmatch(name))


def _as_in_file(name: Name, file: Mapping[str, Any]) -> Name:
    """Return a model variable's name with the file's alias, since a variable can't spell every alias."""
    models = file.get("models")
    if name[0] != "models" or not isinstance(models, dict):
        return name
    return (name[0], next((alias for alias in models if fold(alias) == fold(name[1])), name[1]), *name[2:])


def _pathless(environ: Mapping[str, str], models: Any) -> list[str]:
    """Return one sentence for each model that only an empty path names: somebody wanted that model."""
    empty = (spelling for spelling, text in environ.items() if spelling.startswith(PREFIX) and not text)
    known = {fold(alias) for alias in models} if isinstance(models, dict) else set()
    return [
        f"{spelling} is empty: give model {name[1]!r} a folder, or a name on the Hugging Face Hub, or unset it"
        for spelling, name in ((spelling, _name(spelling)) for spelling in empty)
        if len(name) == 3 and name[::2] == ("models", "path") and fold(name[1]) not in known
    ]


def _read_file(given: Mapping[Name, Variable]) -> dict[str, Any]:
    """Read the TOML file. Raises `OSError`, or `ValueError` if the file is not TOML."""
    if CONFIG not in given:
        return {}
    path = Path(os.path.expanduser(given[CONFIG].text))
    # pydantic-settings takes a missing file for an empty one.
    path.open("rb").close()
    tree = TomlConfigSettingsSource(Settings, toml_file=path)()
    if "config" in tree:
        raise ValueError("the file can't name another one: remove its key config")
    return {key: _lower_keys(value) if key in GROUPS else value for key, value in tree.items()}


def _lower_keys(value: Any) -> Any:
    """Return a table with its keys in lower case, as the variables have them. Raises `ValueError` if two are one."""
    if not isinstance(value, dict):
        return value
    lower: dict[str, Any] = {}
    for key, inner in value.items():
        if key.lower() in lower:
            raise ValueError(f"{key!r} is there twice, since upper and lower case count as one: rename one")
        lower[key.lower()] = inner
    return lower


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge both trees; if they differ, `above` counts."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merged(below[key], above[key])
    return merged


def _nested(given: Mapping[Name, Variable]) -> dict[str, Any]:
    """Return the variables' texts as the file has its values. The validators parse them."""
    tree: dict[str, Any] = {}
    for (*parents, last), variable in given.items():
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = variable.text
    tree.pop("config", None)  # it names the file, and is no part of `Settings`
    return tree


def _settings_near(name: Name) -> list[Name]:
    """Return every setting, for the alias or app in `name`."""
    owner = name[1] if len(name) > 1 and name[1] else "<name>"
    return [
        CONFIG,
        *((field,) for field in Settings.model_fields if field not in (*GROUPS, "tasks")),
        *(("tasks", task) for task in BUILT_IN_TASKS),
        *((group, owner, field) for group, model in GROUPS.items() for field in model.model_fields),
    ]


def _is_setting(name: Name) -> bool:
    return name in _settings_near(name)


def _suggestion(name: Name, spell: Callable[[Name], str]) -> str:
    """Name the setting that is spelled most alike, if one is close."""
    near = {".".join(setting): setting for setting in _settings_near(name)}
    close = difflib.get_close_matches(".".join(name), near, n=1)
    return f"; did you mean {spell(near[close[0]])}?" if close else ""


def _problem(detail: Mapping[str, Any], given: Mapping[Name, Variable], file: Mapping[str, Any]) -> str:
    """Write one of pydantic's errors as a line that names the variable, or the place in the file."""
    name = tuple(str(part) for part in detail["loc"] if part != "[key]")
    variable = next((given[name[:end]] for end in range(1, len(name) + 1) if name[:end] in given), None)
    if variable is None and _holds(file, name[:2]):
        place = f"{'.'.join(name)} in {given[CONFIG].text}"
    else:
        place = _shown(variable) if variable else spelled(name)
    if detail["type"] == "extra_forbidden":
        return f"{place} is not a setting{_suggestion(name, '.'.join)}"
    said = _IN_OTHER_WORDS.get(detail["type"], detail["msg"])
    return f"{place}: {said.removeprefix('Value error, ')}"


def _holds(tree: Any, name: Name) -> bool:
    """Tell whether the tree has a value of this name."""
    for part in name:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _shown(variable: Variable) -> str:
    """Write `NAME='text'`; only the name if the text is a URL, which may hold a password."""
    spelling, text = variable
    return spelling if spelling.upper().endswith("URL") else f"{spelling}={text!r}"


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
        return ",".join(map(str, value)) or "[]"  # an empty variable would count as not set
    if isinstance(value, dict):
        return json.dumps(value)
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _without_login(url: str) -> str:
    """Keep the scheme and the server's address. Keep nothing if it is not clear where the password ends."""
    scheme, separator, rest = url.partition("://")
    login, _, place = rest.rpartition("@")
    is_clear = separator and ":" not in scheme and not {"@", "?"} & set(login)
    return f"{scheme}://{place.partition('?')[0]}" if is_clear else "…"
