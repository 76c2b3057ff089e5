"""What is tried in this process: each function that reads something of a stranger's, or of an operator's.

In: an odd input. Out: nothing if it is read, or refused by this project's own error; any other error goes up.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_inputs import TEXTS, environments, in_base64, mutated, pictures, texts, values
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from kombu.utils import json as kombus

from legit_worker import apps, quickjson, settings
from legit_worker.errors import InvalidInputError, SettingsError
from legit_worker.inputs.images import bytes_of, decode, image_of
from legit_worker.inputs.limits import Limits, limits_of
from legit_worker.inputs.reading import images_or_both_of, texts_or_prepared
from legit_worker.inputs.types import ImageBytes, PreparedText, Text
from legit_worker.pool.limits import seconds_of
from legit_worker.prep import sources
from legit_worker.routing import formats
from legit_worker.routing.envelope import Ending, seal

#: Small, so that an input of a few bytes can be over them.
LIMITS = Limits(
    max_items=3,
    max_characters=500,
    max_image_bytes=100_000,
    max_pixels=1_000_000,
    max_task_pixels=2_000_000,
    image_formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
)

#: The most bytes that this process may grow by while it decodes one image, as a multiple of a million pixels' RGB.
MOST_BYTES = 64 * 3 * LIMITS.max_pixels

#: The most bytes of an envelope.
ENVELOPE_BYTES = 2000

ENVELOPE = Path(__file__).parents[2] / "docs" / "envelope.schema.json"


class GotPastError(Exception):
    """An input came through that should not have, or came out as something else."""


@dataclass(frozen=True)
class Target:
    """One function to try, and what it gets."""

    name: str
    inputs: st.SearchStrategy[Any]
    run: Callable[[Any], None]


def targets() -> list[Target]:
    """All that is tried here."""
    files = pictures()
    every = (*LIMITS.image_formats, "AVIF", "DDS", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA")
    encoded = mutated(in_base64(files)).map(lambda raw: raw.decode("latin-1"))
    return [
        Target("texts", values | st.lists(values, max_size=5), _texts),
        Target("images", mutated(files), lambda file: _image(file, LIMITS.image_formats)),
        Target("all formats", mutated(files), lambda file: _image(file, every)),
        Target("base64", encoded | texts, _base64),
        Target("image arguments", encoded | values | st.lists(encoded | values, max_size=4), _images),
        Target(
            "sources", st.sampled_from(TEXTS) | texts.map("https://{}".format) | texts.map("file:{}".format), _source
        ),
        Target("json", mutated(_documents()) | values.map(lambda value: json.dumps(value).encode()), _json),
        Target("json written", values, _json_written),
        Target("requests", _requests(), _request),
        Target("limits", values, _seconds),
        Target("envelopes", _endings(), _envelope()),
        Target("settings", environments(), _settings),
    ]


def _texts(value: Any) -> None:
    try:
        found = texts_or_prepared(value, "text", LIMITS)
    except InvalidInputError as error:
        _clear(error)
        return
    for item in found:
        if not isinstance(item, Text | PreparedText):
            raise GotPastError(f"{item!r} is no text")
        if isinstance(item, Text):
            item.encode()
        else:
            json.dumps(item.to_json(), allow_nan=False)


def _image(file: bytes, allowed: tuple[str, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        image, size = image_of(file, Limits(**vars(LIMITS) | {"image_formats": allowed}))
        pixels = decode(image)
    except InvalidInputError as error:
        _clear(error)
    else:
        if pixels.mode != "RGB" or not 0 < size <= LIMITS.max_pixels:
            raise GotPastError(f"mode {pixels.mode}, {size} pixels")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MOST_BYTES:
        raise GotPastError(f"this image took {grown} bytes more than any before")


def _base64(text: str) -> None:
    try:
        bytes_of(text, 4000)
    except InvalidInputError as error:
        _clear(error)


def _images(value: Any) -> None:
    try:
        found = images_or_both_of(value, "image", LIMITS)
    except InvalidInputError as error:
        _clear(error)
        return
    if not all(isinstance(item["image"] if isinstance(item, dict) else item, ImageBytes) for item in found):
        raise GotPastError(f"{found!r} are no images, nor texts with images")


def _source(text: str) -> None:
    """With a folder and a host of the operator's, so that paths and hosts are compared. Nothing is resolved."""
    where = sources.Limits(roots=(Path("/nonexistent"),), hosts=("images.invalid",), max_bytes=1000)
    try:
        sources.read(text, where)
    except InvalidInputError as error:
        _clear(error)


def _documents() -> list[bytes]:
    whole = {"a": [1.5] * 20, "b": {"__type__": "datetime", "__value__": "2020-01-01"}, "c": "\u2028\ud800", "d": 2**70}
    return [
        json.dumps(whole).encode(),
        b"[[1.0, NaN, -Infinity], 1e999]",
        b'{"a": 1, "a": 2}',
        b'"\\ud800\\u0000"',
        b"[" * 900,
    ]


def _json(raw: bytes) -> None:
    """Both readers give the same, or both raise."""
    if _outcome(quickjson.loads, raw) != _outcome(kombus.loads, raw):
        raise GotPastError(f"{_outcome(quickjson.loads, raw)} instead of {_outcome(kombus.loads, raw)}")


def _json_written(value: Any) -> None:
    if _outcome(quickjson.dumps, value) != _outcome(kombus.dumps, value):
        raise GotPastError(f"{_outcome(quickjson.dumps, value)} instead of {_outcome(kombus.dumps, value)}")


def _outcome(function: Callable[[Any], Any], value: Any) -> tuple[str, str]:
    try:
        return "value", repr(function(value))
    except Exception as error:
        return "error", type(error).__name__


def _requests() -> st.SearchStrategy[dict[str, Any]]:
    names = ("headers", "kwargs", "delivery_info", "reply_to", "app", "legit_worker_app", "id", "task")
    odd = values | st.dictionaries(st.sampled_from(["app", "routing_key", "legit_worker_app"]), values, max_size=2)
    return st.dictionaries(st.sampled_from(names), odd, max_size=5)


_CHOSEN = settings.load(
    {
        "LEGIT_WORKER_APP_FROM": "header:app,kwarg:app,queue:(?P<app>[a-z]+).*,reply_to",
        "LEGIT_WORKER_APPS__A__RESULT_ROUTING": "1",
        "LEGIT_WORKER_APPS__A__REPLY_TO_PREFIX": "a.",
        "LEGIT_WORKER_APPS__B__MAX_ITEMS": "3",
    }
)


def _request(request: Mapping[str, Any]) -> None:
    app = apps.identify(_CHOSEN, request)
    if app is not None and not isinstance(app, str):
        raise GotPastError(f"app {app!r}")
    limits_of(_CHOSEN, app)
    if app in _CHOSEN.apps:
        apps.answer_queue(str(app), _CHOSEN, request)


def _seconds(value: Any) -> None:
    try:
        seconds_of(value, "the limit")
    except InvalidInputError as error:
        _clear(error)


def _endings() -> st.SearchStrategy[Ending]:
    odd = (
        values
        | st.lists(st.floats(width=32), max_size=20)
        | st.binary()
        | st.sets(st.integers() | st.text(), max_size=3)
    )
    errors = st.builds(ValueError, values) | st.builds(InvalidInputError, texts)
    whose = st.fixed_dictionaries({"status": st.just("SUCCESS"), "result": odd}) | st.fixed_dictionaries(
        {"status": st.sampled_from(["FAILURE", "REVOKED"]), "error": errors}
    )
    return st.builds(
        lambda how, **parts: Ending(**how, **parts),
        how=whose,
        id=texts.filter(bool),
        task=texts.filter(bool),
        app=st.sampled_from(["a", "b"]),
        meta=odd,
        queued_at=values | st.datetimes().map(str),
        started_at=st.none() | st.floats(0, 4e9),
        finished_at=st.floats(0, 4e9),
        worker=texts,
    )


def _envelope() -> Callable[[Ending], None]:
    """Each envelope keeps the schema, whatever its task returned, and each format can hold it."""
    schema = Draft202012Validator(json.loads(ENVELOPE.read_text()))
    jobs = [
        settings.AppSettings(format=form, job=job, result_routing=True)
        for form, job in (("json", None), ("celery", "a.task"), ("laravel", "App\\Jobs\\X@handle"))
    ]

    def run(ending: Ending) -> None:
        for encoding in ("json", "base64"):
            envelope = seal(ending, encoding=encoding, max_bytes=ENVELOPE_BYTES)
            if "__type__" not in envelope.decode():
                schema.validate(json.loads(envelope))
            for chosen in jobs:
                for push in formats.pushes(chosen, "a.results", ending.id, envelope):
                    json.loads(push.value)

    return run


def _settings(environ: dict[str, str]) -> None:
    """What is taken at start can be used later."""
    try:
        chosen = settings.load(environ)
    except SettingsError as error:
        _clear(error)
        return
    list(settings.changed(chosen))
    settings.unknown_models(chosen)
    settings.with_bounds(chosen)
    for app, own in chosen.apps.items():
        limits_of(chosen, app)
        formats.pushes(own, formats.queue_of(app, own), "an-id", b"{}")
        _connection(own.url)
    apps.identify(chosen, {"delivery_info": {"routing_key": "queue"}, "kwargs": {"app": "a"}, "reply_to": "x"})
    where = sources.Limits(hosts=chosen.prep_hosts, allow_private=chosen.prep_private)
    for url in ("https://images.example.org:8443/x", "http://a/x"):
        parts = sources.urlsplit(url)
        any(sources._covers(entry, parts, 443) for entry in where.hosts)
    for address in ("10.1.2.3", "::1"):
        sources._is_allowed(address, where)


def _connection(url: str | None) -> None:
    """As a lane makes it, which opens nothing. A URL that can't be read would fail each delivery."""
    if url:
        from kombu import Connection
        from kombu.transport.redis import Channel

        connection = Connection(url)
        connection.as_uri()
        if connection.transport.driver_type == "redis":
            Channel._prepare_virtual_host(None, connection.virtual_host)


def _clear(error: Exception) -> None:
    """An error's text is one that a person can read, a client can decode, and a log can count."""
    text = str(error)
    text.encode()
    if not text or len(text) > 5000 or " object at 0x" in text:
        raise GotPastError(f"this says little: {text[:300]!r}") from error
