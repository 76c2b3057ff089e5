"""What strangers may send: strategies of hypothesis, which start from a corpus of inputs that once made trouble.

In: nothing. Out: strategies for JSON values, bytes, files, arguments of built-in tasks, headers, messages, settings.
"""

from __future__ import annotations

import base64
import io
import json
import string
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from legit_worker.settings import AppSettings, ModelSettings, Settings
from legit_worker.settings.values import BUILT_IN_TASKS, FORMATS, PREFIX

#: Texts that libraries take for something else, or that tokenizers and encoders treat in a way of their own.
TEXTS = (
    *("", " ", "\u00a0", "\u200b", "\ufeff", "\x00", "\ud800", "a \udfff b", "\u202e\u2069", "\u2028", "e\u0301" * 40),
    *("http://169.254.169.254/x.png", "file:///etc/passwd", "/etc/passwd", "./x", "https://[::1", "data:image/png,x"),
    *(
        "data:;base64,",
        "data:image/png;base64,iVBOR",
        "/9j/",
        "=",
        "====",
        "a===",
        "AAAA====",
        "%%%%",
        "AA\nAA",
        "-_-_",
    ),
    *("[MASK] [SEP] [PAD]", "<|endoftext|>", "{{", "%s %n", "NaN", "null", "[1]", "{}", "🚆" * 30, "中文", "ﷺ" * 9),
)

#: Numbers at which types end.
NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, -(10**30), 1e308, 5e-324, -0.0, 0.1)
FLOATS = (float("nan"), float("inf"), float("-inf"))

#: What `prep_text` may have made, and nearly so.
PREPARED: tuple[dict[str, Any], ...] = (
    {"prepared": 1, "ids": [2, 5, 3], "tokenizer": "0" * 16, "cut": False},
    {"prepared": 2, "ids": [2, 5, 3], "tokenizer": "0" * 16, "cut": False},
    {"prepared": True, "ids": [], "tokenizer": None},
    {"prepared": 1, "ids": [-1, 2**70], "tokenizer": "x", "cut": 3},
    {"prepared": 1, "ids": "ab", "tokenizer": []},
    {"prepared": 1, "ids": [True, None], "tokenizer": "x"},
    {"text": "a", "image": "http://127.0.0.1:1/x.png"},
)

characters = st.characters(exclude_categories=())
long_texts = st.builds(lambda part, times: part * times, st.sampled_from([t for t in TEXTS if t]), st.integers(1, 400))
texts = st.one_of(st.sampled_from(TEXTS), st.text(characters, max_size=30), long_texts)
leaves = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(FLOATS), st.integers(), st.floats(), texts
)
values = st.recursive(
    leaves | st.sampled_from(PREPARED),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, corpus: list[bytes]) -> bytes:
    """A member of the corpus, in which a few bytes were changed, cut out, doubled, or put in."""
    raw = bytearray(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(len(raw), start + draw(st.integers(0, 9)))
        match draw(st.integers(0, 3)):
            case 0:
                raw[start:end] = draw(st.binary(max_size=9))
            case 1:
                del raw[start:]
            case 2:
                raw[start:start] = raw[start:end] * draw(st.integers(1, 50))
            case 3:
                raw[start:end] = draw(st.sampled_from([b"\xff" * 4, b"\x00" * 4, b'"', b"{", b"]", b"\\u0000", b"="]))
    return bytes(raw)


def pictures() -> list[bytes]:
    """A small file of each format and mode that this Pillow can write."""
    files = []
    gradient = Image.radial_gradient("L").resize((16, 12))
    for form in FORMATS:
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"):
            target = io.BytesIO()
            try:
                gradient.convert(mode).save(target, form)
            except (OSError, ValueError, KeyError):
                continue
            files.append(target.getvalue())
    animation = io.BytesIO()
    gradient.save(animation, "GIF", save_all=True, append_images=[gradient.rotate(90)])
    turned = Image.Exif()
    turned[0x0112] = 6
    camera = io.BytesIO()
    gradient.save(camera, "JPEG", exif=turned)
    return [*files, animation.getvalue(), camera.getvalue(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]


def in_base64(files: list[bytes]) -> list[bytes]:
    """As clients write it: plain, by the alphabet for URLs, in lines, and behind a head."""
    plain = [base64.b64encode(file) for file in files]
    lines = [b"\r\n".join(text[start : start + 76] for start in range(0, len(text), 76)) for text in plain]
    return [*plain, *(base64.urlsafe_b64encode(file) for file in files), *lines, *(b"data:;base64," + t for t in plain)]


# Arguments of the built-in tasks

#: The names and kinds of the worker's models.
MODELS = ("embed", "rerank", "image", "sparse", "multi")


def arguments_of(task: str, images: list[bytes]) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of a built-in task: mostly its own, some odd, some unknown."""
    good = st.sampled_from(["a cat sat", "the red apple", "dog"])
    image = mutated(images).map(lambda raw: raw.decode("latin-1"))
    item = st.one_of(good, values, image) if "image" in task else st.one_of(good, values)
    counts = st.one_of(st.integers(-2, 70), values)
    known: dict[str, st.SearchStrategy[Any]] = {"model": st.sampled_from([None, *MODELS]) | values}
    match task:
        case "embed_text":
            known |= {"text": item | st.lists(item, max_size=4), "normalize": st.booleans() | values}
            known |= {"truncate": st.booleans() | values}
            known |= {"precision": st.sampled_from(["float32", "int8", "ubinary"]) | values, "dimensions": counts}
        case "embed_sparse":
            known |= {"text": item | st.lists(item, max_size=4), "max_active": counts}
        case "embed_multi":
            known |= {"text": item | st.lists(item, max_size=4), "normalize": st.booleans() | values}
        case "classify":
            pair = st.lists(item, min_size=2, max_size=2) | values
            known |= {"pair": pair | st.lists(pair, max_size=3), "top_k": counts}
        case "embed_image" | "prep_image":
            known |= {"image": item | st.lists(item, max_size=3)}
        case "rerank":
            known |= {"query": item, "documents": st.lists(item, max_size=4) | values, "top_k": counts}
        case "prep_text":
            known |= {"text": item | st.lists(item, max_size=4), "chunk_tokens": counts, "overlap": counts}
    unknown = st.dictionaries(st.sampled_from(["app", "meta", "self", "task_id", "x"]), values, max_size=1)
    if "text" in known:
        prompts = st.sampled_from([None, "query", "document"]) | values
        known |= {"task": prompts, "prompt_name": prompts, "prompt": texts | values}
    first = next(name for name in known if name != "model")
    needed = {name: known.pop(name) for name in (first, "documents") if name in known}
    return st.builds(dict.__or__, unknown, st.fixed_dictionaries(needed, optional=known))


# Messages

#: The headers that Celery, kombu or this package reads. An ETA that is right would only be waited for.
HEADERS = (
    *("id", "task", "lang", "timelimit", "expires", "retries", "stamps", "stamped_headers", "shadow", "group", "app"),
    *("group_index", "ignore_result", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "compression"),
    *("replaced_task_nesting", "meth", "headers", "meta", "queued_at", "route", "reply_to", "legit_worker_app"),
    *("legit_deliveries", "legit_address", "x-delivery-count", "traceparent", "x-death", "delivery_info", "__type__"),
)
PROPERTIES = ("priority", "body_encoding", "reply_to", "correlation_id", "delivery_mode", "delivery_info", "expiration")
EMBED = ("callbacks", "errbacks", "chain", "chord")
TIMES = ("2020-01-01T00:00:00+00:00", "2020-13-01", "0001-01-01T00:00:00Z", "x", "")


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """A message for a task, as kombu writes it to Redis, of which some parts are odd."""
    embed = draw(st.dictionaries(st.sampled_from(EMBED), values, max_size=2))
    body: Any = [[], {"text": "a cat"}, embed]
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.integers(0, 2))] = draw(values)
    headers = {"task": "legit_worker.embed_text", "id": "ID", "lang": "py", "root_id": "ID", "app": "a"}
    headers |= draw(st.dictionaries(st.sampled_from(HEADERS) | texts, values, max_size=3))
    if draw(st.integers(0, 5)) == 0:
        headers["eta"] = draw(st.sampled_from(TIMES))
    properties = {
        "body_encoding": "base64",
        "delivery_tag": "TAG",
        "delivery_info": {"exchange": "", "routing_key": "q"},
    }
    properties |= draw(st.dictionaries(st.sampled_from(PROPERTIES), values, max_size=1))
    whole = {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    if draw(st.integers(0, 3)) == 0:
        whole[draw(st.sampled_from(sorted(whole)))] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        del whole[draw(st.sampled_from(sorted(whole)))]
    return whole


# Settings

SCALARS = (
    *(
        "1",
        "0",
        "on",
        "off",
        "auto",
        "none",
        "-1",
        "0.0",
        "nan",
        "inf",
        "1e999",
        "1_0",
        "٣",
        "10%",
        "101%",
        "4GiB",
        "-4MiB",
    ),
    *("device", "prep", "cpu", "cuda:0", "cuda:99", "simulated", "embed", "rerank", "module:Class", "a:b:c", "json"),
    *(
        "laravel",
        "celery",
        "App\\Jobs\\X@handle",
        "float32",
        "int8",
        "openvino",
        "minilm",
        "minlm",
        "[]",
        "{}",
        "[1",
        "{",
    ),
    *("~", "~nobody-here/x", "~/models", "/nowhere", "/dev/null", "10.0.0.0/33", "10.0.0.0/8", "fe80::/10", "::", "*."),
    *(
        "https://",
        "http://a",
        "*.example.org:8443",
        "a.example.org:99999",
        "https://u:p@h",
        "redis://h:x/0",
        "redis://[",
    ),
    *(
        "redis://localhost:6379/zero",
        "amqp://h:port//",
        "nats://x",
        "memory://",
        "sentinel://a;sentinel://b",
        ";",
        "://",
    ),
    *(
        "redis://localhost:99999/0",
        "rediss://localhost?ssl_cert_reqs=odd",
        "redis+socket:///tmp/x",
        "tcp://10.0.0.1:80",
    ),
    *(
        "header:app,kwarg:app",
        "header:",
        "queue:(?P<app>.*",
        "queue:x",
        "queue:(?P<app>a+)+",
        "reply_to",
        ",",
        "PNG,EPS",
    ),
    *('{"a": "b"}', '{"a": {"b": 1}}', '{"a": {"b": null}}', '["a", "a"]', '{"": {}}', "a,b,c", "\x00", "ü", "\udcff"),
)

#: The names of all settings, and of some that Kubernetes or a typing error makes.
NAMES = (
    *(name for name in Settings.model_fields if name not in ("models", "apps", "tasks")),
    *(f"models__minilm__{name}" for name in ModelSettings.model_fields),
    *(f"apps__a__{name}" for name in AppSettings.model_fields),
    *(f"tasks__{task}" for task in BUILT_IN_TASKS),
    *(
        "apps__a",
        "models__minilm",
        "models____path",
        "apps____queue",
        "enabled__x",
        "config",
        "tasks",
        "models__x__y__z",
    ),
    *("service_host", "service_port", "service_port_http", "port", "port_80_tcp", "port_80_tcp_addr", "metrics_port_x"),
)


@st.composite
def environments(draw: st.DrawFn) -> dict[str, str]:
    """A few variables."""
    name = st.sampled_from(NAMES) | st.text(string.ascii_lowercase + "_", max_size=12)
    text = st.sampled_from(SCALARS) | st.text(st.characters(exclude_characters="\x00"), max_size=12)
    given = draw(st.dictionaries(name, text, max_size=4))
    if draw(st.booleans()):
        given |= {"models__minilm__kind": "simulated"}
    return {PREFIX + key.upper(): value for key, value in given.items()}
