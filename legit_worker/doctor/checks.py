"""The checks of `celery legit doctor`. If one check fails, later ones may fail because of it.

In: a Celery app, and the environment. Out: findings; each says what it saw and what to do. A check that imports torch
or may open a CUDA context runs in its own process (`probes.py`), so that no check changes this one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from celery import Celery

from legit_worker import settings
from legit_worker.device import cuda, vram
from legit_worker.errors import LegitWorkerError, SettingsError
from legit_worker.models import requirements
from legit_worker.prep.texts import model_folder, tokenizer_of
from legit_worker.routing.dead import DeadLetters
from legit_worker.routing.wires import connect, reach

#: The oldest Celery that works, and the first that is too new, as (major, minor).
CELERY = ((5, 5), (5, 8))

#: The packages whose versions are reported. Another check reports a missing one, if it needs the package.
PACKAGES = (
    "celery",
    "kombu",
    "redis",
    "greenlet",
    "torch",
    "sentence-transformers",
    "tokenizers",
    "openvino",
    "nncf",
    "nvidia-ml-py",
)

#: The first Redis that has BLMOVE.
REDIS = (6, 2)

#: Seconds for a probe, and for each model that it loads.
PROBE_SECONDS = 300

#: The least cosine between what an input gives in a batch and what it gives alone.
COSINE = 0.9999


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of a check."""

    #: The check's name.
    about: str
    level: Literal["ok", "warning", "failure"]
    #: What was seen.
    seen: str
    #: What to do; empty if all is well.
    fix: str = ""


def examine(app: Celery) -> Iterator[str | Finding]:
    """Run all checks, one after the other: yield a line before each, then its findings.

    If a check raises, that is a failure, and the others go on.
    """
    try:
        chosen = settings.load(enabled_by_default=True)
    except SettingsError as error:
        yield replace(failure(str(error), "correct these variables: the other checks need them"), about="settings")
        return
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "settings": lambda: _settings(app, chosen),
        "versions": _versions,
        "broker": lambda: _broker(app, chosen),
        "results": lambda: _results(app, chosen),
        "models": lambda: _models(chosen),
        "gpu": lambda: _gpu(chosen),
        "prep": lambda: _prep(chosen),
        "batches": lambda: _batches(chosen),
    }
    for number, (about, check) in enumerate(checks.items(), 1):
        yield f"[{number}/{len(checks)}] {about}"
        yield from (replace(finding, about=about) for finding in _unbroken(check))


def _unbroken(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        yield failure(f"this check could not be made: {type(error).__name__}: {error}", "correct this, or report it")


def ok(seen: str) -> Finding:
    return Finding(about="", level="ok", seen=seen)


def warning(seen: str, fix: str) -> Finding:
    return Finding(about="", level="warning", seen=seen, fix=fix)


def failure(seen: str, fix: str) -> Finding:
    return Finding(about="", level="failure", seen=seen, fix=fix)


def _settings(app: Celery, chosen: settings.Settings) -> Iterator[Finding]:
    ours = sum(name.startswith(settings.PREFIX) for name in os.environ)
    yield ok(f"{ours} variables, role {chosen.role}, {len(chosen.models)} models, {len(chosen.apps)} apps")
    if not settings.is_enabled(default=app.main == "legit_worker"):
        yield warning("LEGIT_WORKER_ENABLED is not 1 here: workers are stock Celery's", "set it to 1 for batches")
    for sentence in settings.unknown_models(chosen):
        yield warning(sentence, "correct the name, unless another worker has this model")
    for sentence in settings.doubtful(chosen):
        yield warning(sentence, "or unset it")
    for sentence in settings.misnamed(chosen):
        yield failure(sentence, "correct this: no worker starts before")


def _versions() -> Iterator[Finding]:
    found = {name: version for name in PACKAGES if (version := _version(name))}
    yield ok(", ".join(f"{name} {version}" for name, version in {"python": sys.version.split()[0], **found}.items()))
    celery = tuple(int(part) for part in found["celery"].split(".")[:2])
    if not CELERY[0] <= celery < CELERY[1]:
        yield warning(f"Celery {found['celery']} was never tried with this pool", "install one of 5.5 to 5.7")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _broker(app: Celery, chosen: settings.Settings) -> Iterator[Finding]:
    with app.connection_for_read() as connection:
        name = connection.as_uri()
        try:
            reach(connection)
        except Exception as error:
            yield failure(f"{name} does not answer: {error}", "start it, or correct the broker's URL")
            return
        yield ok(f"{name} answers")
        if connection.transport.driver_type == "redis":
            seconds = connection.default_channel.visibility_timeout
            yield ok(
                f"a killed worker's messages come back within {chosen.lease_seconds:.0f} s "
                f"(LEGIT_WORKER_LEASE_SECONDS), a stock worker's after {seconds:.0f} s (visibility_timeout)"
            )
            yield from _redis(connection.default_channel.client)
        elif connection.transport.driver_type == "amqp" and not connection.transport_options.get("confirm_publish"):
            yield warning(
                "what a task sends while its connection breaks, such as its retry, is lost and nobody hears of it",
                'if tasks send tasks, set broker_transport_options={"confirm_publish": True}',
            )
    yield from _dead_letters(app, chosen)


def _dead_letters(app: Celery, chosen: settings.Settings) -> Iterator[Finding]:
    counts = DeadLetters(app, chosen).totals()
    if counts:
        seen = ", ".join(f"{count} {name}" for name, count in counts.items())
        yield warning(f"dead letters: {seen}", "`celery legit dead list` shows them; replay or drop them")
    else:
        yield ok("no dead letters")


def _redis(client: Any) -> Iterator[Finding]:
    server = client.info("server")
    version = server.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2]) < REDIS:
        yield warning(
            f"Redis {version} has no BLMOVE: if a worker is killed, a message on its way to it is lost",
            "take Redis 6.2 or newer, or Valkey",
        )
    policy = client.info("memory").get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield warning(
            f"maxmemory-policy is {policy}: Redis may drop queues when it is full",
            "CONFIG SET maxmemory-policy noeviction, for a broker",
        )


def _results(app: Celery, chosen: settings.Settings) -> Iterator[Finding]:
    yield from _stock_results(app)
    for name, own in chosen.apps.items():
        if own.result_routing and own.url:
            yield from _server_of(app, name, own.url)


def _server_of(app: Celery, name: str, url: str) -> Iterator[Finding]:
    with connect(app, url) as connection:
        try:
            reach(connection)
        except Exception as error:
            seen = f"{connection.as_uri()}, for the results of app {name}, does not answer: {error}"
            yield failure(seen, f"start it, or correct LEGIT_WORKER_APPS__{name.upper()}__URL")
        else:
            yield ok(f"{connection.as_uri()} answers, for the results of app {name}")


def _stock_results(app: Celery) -> Iterator[Finding]:
    try:
        backend = app.backend
    except (KeyError, TypeError, ValueError):  # which may show a part of the password
        yield failure("the result backend's URL can't be read", "write what is special in a password as %XX")
        return
    name = type(backend).__name__
    client = getattr(backend, "client", None)
    if client is not None and hasattr(client, "ping"):
        try:
            client.ping()
        except Exception as error:
            yield failure(f"{backend.as_uri()} does not answer: {error}", "correct the result backend's URL")
            return
    yield ok(f"{name}, {backend.as_uri()}")


def _models(chosen: settings.Settings) -> Iterator[Finding]:
    if not chosen.models:
        yield warning("no model is configured", "set LEGIT_WORKER_MODELS__<ALIAS>__PATH")
    try:
        requirements.check(chosen)
    except SettingsError as error:
        yield failure(str(error), "correct this: no worker starts before")
    for alias, model in chosen.models.items():
        if model.kind not in settings.KINDS_WITH_PATH or model.path is None:
            wrong = probe("own_class", model.kind).get("error") if ":" in model.kind else None
            seen = f"{alias}: kind {model.kind}"
            yield failure(f"{seen}: {wrong}", "correct KIND, or the class") if wrong else ok(seen)
        elif model_folder(model.path, model.revision) is None:
            yield warning(
                f"{alias}: {model.path} is neither a folder nor in the local cache",
                "correct the path, or download the model before the first task has to wait for it",
            )
        else:
            tokenizer = tokenizer_of(model.path, model.revision) if model.kind == "embed" else None
            prepared = f"; prep processes can read its tokenizer ({tokenizer.fingerprint})" if tokenizer else ""
            yield ok(f"{alias}: kind {model.kind} at {model.path}{prepared}")
        if model.backend == "auto" and _version("openvino") is None:
            yield warning(
                f"{alias}: BACKEND=auto, and openvino is not installed", "pip install 'legit-worker[openvino]'"
            )


def _gpu(chosen: settings.Settings) -> Iterator[Finding]:
    if not cuda.may_be_gpu(chosen.device):
        yield ok(f"not looked for: LEGIT_WORKER_DEVICE={chosen.device}")
        return
    try:
        gpus = vram.visible_gpus()
    except vram.VramUnknownError as error:
        if chosen.device == "auto" and not _has_gpu_files():
            yield ok("this machine has no NVIDIA GPU: models run on the CPU")
            return
        fix = "correct this, or set LEGIT_WORKER_DEVICE=cpu"
        yield warning(str(error), fix) if chosen.device == "auto" else failure(str(error), fix)
        gpus = ()
    for number, gpu in enumerate(gpus):
        memory = vram.memory(gpu)
        yield ok(f"cuda:{number} is {gpu.name} {gpu.uuid}: {memory.free:,} of {memory.total:,} bytes are free")
    cuda.prepare_environment()
    if gpus and not vram.is_order_known(gpus):
        yield warning("CUDA may count these GPUs in another order", "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    yield from _compare_with_torch(gpus)


def _compare_with_torch(gpus: Sequence[vram.Gpu]) -> Iterator[Finding]:
    seen = probe("torch_gpus")
    ours = [gpu.uuid.removeprefix("GPU-") for gpu in gpus]
    if seen["uuids"] is None:
        yield ok(f"torch {seen['version']} sees {seen['count']} GPUs")
    elif seen["uuids"] == ours[: len(seen["uuids"])] and bool(ours) == bool(seen["uuids"]):
        yield ok(f"torch {seen['version']} sees the same {seen['count']}, in the same order")
    else:
        yield failure(
            f"torch {seen['version']} sees {seen['uuids']}, and NVML {ours}",
            "is torch a build for CUDA, and for this driver? Set CUDA_VISIBLE_DEVICES to UUIDs",
        )


def _has_gpu_files() -> bool:
    """Tell whether a driver shows a GPU here: a container may have the GPU and lack NVML. `dxg` is Windows' own."""
    return any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "dxg"))


def _prep(chosen: settings.Settings) -> Iterator[Finding]:
    alias = next((alias for alias, model in chosen.models.items() if model.kind == "embed"), "")
    seen = probe("prep", alias, LEGIT_WORKER_ROLE="prep")
    if seen["driver"]:
        yield failure(f"a prep process has loaded {seen['driver']}", "find who did, with strace -e openat")
    elif not seen["refused"]:
        yield failure("a prep process was not stopped when it asked for CUDA", "call install() before importing torch")
    else:
        yield ok(f"a prep process ({seen['did']}) has no driver loaded, and is refused when it asks for CUDA")


def _batches(chosen: settings.Settings) -> Iterator[Finding]:
    aliases = [alias for alias, model in chosen.models.items() if model.kind in settings.KINDS_WITH_PATH]
    if not aliases:
        yield ok("no model of a built-in kind to try")
        return
    for alias, seen in probe("batches", *aliases).items():
        if "error" in seen:
            yield failure(seen["error"], "correct this model's settings, or its files")
            continue
        rates = f"{seen['alone']:.0f} {seen['of']}/s alone, {seen['batched']:.0f} in batches, by {seen['backend']}"
        if seen["cosine"] >= COSINE:
            yield ok(f"{alias} on {seen['device']}: {rates}; worst cosine between the two {seen['cosine']:.6f}")
        else:
            yield failure(
                f"{alias} on {seen['device']}: results depend on the batch (worst cosine {seen['cosine']:.6f})",
                "try DTYPE=float32; `celery legit validate` names the inputs",
            )


def probe(name: str, *arguments: str, **variables: str) -> Any:
    """Run a function of `probes.py` in its own process. Raises `LegitWorkerError` if it fails."""
    command = [sys.executable, "-m", "legit_worker.doctor.probes", name, *arguments]
    kept = os.environ | variables
    seconds = PROBE_SECONDS * max(1, len(arguments))
    finished = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=seconds, check=False)
    if finished.returncode:
        raise LegitWorkerError((finished.stderr.strip().splitlines() or ["its process printed no error"])[-1])
    return json.loads(finished.stdout.splitlines()[-1])
