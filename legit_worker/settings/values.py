"""What a setting may hold: the types of values, and how each is read from a variable's text.

In: a variable's text, or a value of the TOML file. Out: a value that was checked, or `ValueError` for pydantic.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints, ValidationInfo

from legit_worker.settings.amounts import Amount, Rate

PREFIX = "LEGIT_WORKER_"

#: Stands between the parts of a variable's name.
DELIMITER = "__"

#: What a task says of its texts, and of its vectors.
_WORDING = ("task", "prompt_name", "prompt")
_FORM = ("dimensions", "precision")

#: The built-in tasks, which can have other names as well, and the arguments of each.
BUILT_IN_TASKS = {
    "embed_text": ("text", "model", "normalize", "truncate", *_WORDING, *_FORM),
    "embed_image": ("image", "model", "normalize", *_FORM),
    "embed_sparse": ("text", "model", *_WORDING, "max_active"),
    "embed_multi": ("text", "model", "normalize", *_WORDING),
    "rerank": ("query", "documents", "model", "top_k"),
    "classify": ("pair", "model", "top_k"),
    "prep_text": ("text", "model", "chunk_tokens", "overlap", *_WORDING, *_FORM),
    "prep_image": ("image", "model"),
}

#: The kinds of model that are read from a path.
KINDS_WITH_PATH = ("embed", "rerank", "sparse", "multi", "image")

#: The types of weights that a backend takes.
DTYPES_OF = {
    "torch": ("auto", "float32", "tf32", "float16", "bfloat16"),
    "openvino": ("auto", "float32", "bfloat16", "int8"),
    "onnx": ("auto", "float32", "bfloat16"),
    "auto": ("auto", "float32", "tf32", "float16", "bfloat16"),
}

#: The kinds whose vectors are dense rows: they can be shortened, normalized and quantized.
DENSE_KINDS = ("embed", "image")

#: The formats that an image may have, by Pillow's names: those that only decode pixels. EPS and its like run programs.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
    *("AVIF", "DDS", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA"),
)

#: The form of a host that files may be fetched from. A `*.` stands for all hosts below.
_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|[0-9a-f:.]+", re.IGNORECASE)

#: The servers whose databases have numbers.
_NUMBERED = ("redis", "rediss", "valkey", "valkeys", "sentinel")

#: The form of an app's or a queue's name.
NAME = r"[A-Za-z0-9_.:-]{1,128}"

#: Characters that an alias may have and that a shell does not allow in a variable's name: a variable has `_` instead.
_UNSPELLABLE = re.compile(r"[-./]")

#: Commas between app sources. A comma inside a queue's regex isn't followed by the start of another source.
_BETWEEN_SOURCES = re.compile(r",\s*(?=(?:header|kwarg|queue):|reply_to\s*(?:,|$))")


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


def matching(pattern: str, meaning: str) -> AfterValidator:
    """Check that the whole string matches; the error says `meaning`."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"should be {meaning}")
        return value

    return AfterValidator(check)


def nothing_if(word: str, nothing: Any = None) -> BeforeValidator:
    """Read this word as nothing."""
    return BeforeValidator(lambda value: nothing if isinstance(value, str) and value.lower() == word else value)


def no_switch(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuse true and false of a file for anything but a switch: they would count as the numbers 1 and 0."""
    if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation not in (bool, bool | None):
        raise ValueError(f"{str(value).lower()} is no value of this setting, which is no switch")
    return value


def _some(amount: Amount) -> Amount:
    if not amount.number:
        raise ValueError("should be above 0")
    return amount


def _leaves_some(amount: Amount) -> Amount:
    if amount == Amount(100, "%"):
        raise ValueError("100% leaves no memory for models")
    return amount


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


def _options(value: Any) -> Any:
    """Read a JSON object."""
    return listed(value) if isinstance(value, str) and value.lstrip()[:1] == "{" else value


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


def _host(entry: str) -> str:
    """Refuse an entry that covers no host, or more than a host."""
    url = urlsplit(entry if "://" in entry else f"https://{entry}")
    try:
        is_host = _HOST.fullmatch(url.hostname or "") and (url.port is None or url.port > 0)
    except ValueError:  # the port is no number
        is_host = None
    rest = url.path.strip("/") or url.query or url.fragment or url.username is not None
    if not is_host or rest or url.scheme not in ("http", "https"):
        raise ValueError(
            f"{entry!r} should be a host: images.example.org, *.example.org:8443 or http://images.internal"
        )
    return entry


def _network(entry: str) -> str:
    """Refuse what is no network of IP addresses."""
    try:
        ipaddress.ip_network(entry, strict=False)
    except ValueError as error:
        raise ValueError(f"{error}: give a network such as 10.0.0.0/8") from None
    return entry


def at_home(folder: Any) -> Any:
    """Write a folder that begins with `~` in full."""
    if not isinstance(folder, str | Path) or not str(folder).startswith("~"):
        return folder
    full = os.path.expanduser(folder)
    if str(full).startswith("~"):
        raise ValueError(f"{str(folder)!r}: no user of this machine has this name")
    return full


def _format(name: str) -> str:
    """Refuse a format that is not read here."""
    if name.upper() not in FORMATS:
        raise ValueError(f"{name!r} should be one of {', '.join(FORMATS)}")
    return name.upper()


def _one_at_least(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse an empty list. Pydantic's own check would also complain of a list whose entries were all refused."""
    if not formats:
        raise ValueError("should name at least 1")
    return formats


def _server(url: str | None) -> str | None:
    """Refuse a URL that Celery has no transport for. The error may show no password, so it shows the scheme alone."""
    from kombu.transport import TRANSPORT_ALIASES

    for one in (url or "").split(";"):
        scheme, found, _ = one.strip().partition("://")
        name = scheme.partition("+")[0]
        if found and name not in TRANSPORT_ALIASES and re.fullmatch(r"[\w-]*", name):
            raise ValueError(f"{name}:// is no server that Celery knows: redis, rediss, sentinel, amqp, amqps are")
        if found and "+" not in scheme:
            _check_place(name, one.strip())
    return url


def _check_place(scheme: str, url: str) -> None:
    """Refuse a URL that kombu could not read at the delivery of a result. No error shows a part of it."""
    from kombu.utils.url import parse_url

    try:
        path = parse_url(url)["virtual_host"] or "0"
    except (KeyError, TypeError, ValueError):
        problem = "has a port that is no port, an open bracket, or an option that is no option of the server"
    else:
        if scheme not in _NUMBERED or path.strip("/").isdecimal():
            return
        problem = "should end in the number of a database, such as /0"
    raise ValueError(f"the URL {problem}; write what is special in a password as %XX")


#: A name that is part of a variable's name. Variables are often upper case, so case doesn't count.
Key = Annotated[str, StringConstraints(to_lower=True, min_length=1)]
SafeName = Annotated[str, matching(NAME, "1 to 128 of the characters A-Z a-z 0-9 _ . : -")]
#: A queue of an app. Laravel's queues on a Redis Cluster are in braces, so that all keys of one are on one node.
QueueName = Annotated[
    str,
    matching(
        rf"{NAME}|\{{{NAME}\}}", "1 to 128 of the characters A-Z a-z 0-9 _ . : -, and may be in one pair of braces"
    ),
]
AppName = Annotated[SafeName, StringConstraints(to_lower=True)]
ModelAliases = Annotated[tuple[Key, ...], BeforeValidator(listed)]
Folder = Annotated[Path, BeforeValidator(at_home)]
Folders = Annotated[tuple[Folder, ...], BeforeValidator(listed)]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(listed)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], BeforeValidator(listed)]
Formats = Annotated[
    tuple[Annotated[str, AfterValidator(_format)], ...], AfterValidator(_one_at_least), BeforeValidator(listed)
]
ServerUrl = Annotated[str | None, AfterValidator(_server)]
AppSources = Annotated[tuple[AppSource, ...], BeforeValidator(_sources)]
Kind = Annotated[
    str,
    matching(
        rf"{'|'.join(KINDS_WITH_PATH)}|simulated|[^\W\d][\w.]*:[^\W\d][\w.]*",
        f"{', '.join(KINDS_WITH_PATH)}, simulated, or a class of your own as module:Class",
    ),
]
DeviceName = Annotated[
    str,
    matching(
        r"auto|cpu|cuda(:[0-9]+)?|simulated|(GPU|MIG)-[0-9A-Za-z/-]+",
        "auto, cpu, cuda, cuda:N, simulated, or a GPU's UUID as `nvidia-smi -L` prints it: GPU-… or MIG-…",
    ),
]
#: How the queue of a model is named: `{model}` stands for its alias.
QueuePattern = Annotated[
    str,
    matching(
        r"[A-Za-z0-9_.:-]{0,64}\{model\}[A-Za-z0-9_.:-]{0,64}", "a queue's name with {model} in it, as legit.{model}"
    ),
]
Memory = Annotated[
    Amount,
    BeforeValidator(lambda value: Amount.parse(str(value)) if isinstance(value, str | int | float) else value),
]
SomeMemory = Annotated[Memory, AfterValidator(_some)]
Headroom = Annotated[Memory, AfterValidator(_leaves_some)]
TaskRate = Annotated[
    Rate, BeforeValidator(lambda value: Rate.parse(str(value)) if isinstance(value, str | int | float) else value)
]
Bytes = Annotated[Memory, AfterValidator(_in_bytes)]
SomeBytes = Annotated[Bytes, AfterValidator(_some)]
BuiltInTask = Annotated[str, matching("|".join(BUILT_IN_TASKS), f"one of {', '.join(BUILT_IN_TASKS)}")]
TaskAliases = Annotated[
    dict[Annotated[str, StringConstraints(min_length=1)], dict[str, str | None]], BeforeValidator(_renames_by_alias)
]
Seconds = Annotated[float, Field(ge=0)]
SomeSeconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]
#: Arguments by their names, as JSON.
Options = Annotated[dict[str, Any], BeforeValidator(_options)]
#: Pillow itself refuses larger images: 178,956,970 pixels (`Image.MAX_IMAGE_PIXELS`, twice).
Pixels = Annotated[int, Field(ge=1, le=178_956_970)]


#: The parts of a setting's name, in lower case: `("models", "minilm", "path")`.
Name = tuple[str, ...]


def spelled(name: Name) -> str:
    """Return the variable of this name."""
    return PREFIX + DELIMITER.join(name).upper()


def path_variable(alias: str) -> str:
    """Return the variable that configures a model of this alias, as a shell takes it."""
    return spelled(("models", fold(alias), "path"))
