"""Decides what computes a model: torch or OpenVINO, as the operator chose, or by a trial.

In: a model that torch has loaded, and the settings. Out: its graphs, or None for torch; and a sentence for the log.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from legit_worker.backends import onnx
from legit_worker.backends.agreement import Agreement, of_scores, of_vectors
from legit_worker.backends.cache import Cache
from legit_worker.backends.graphs import (
    PRECISIONS,
    Features,
    Graphs,
    convert,
    core,
    first_line,
    has_bfloat16,
    library,
    quantized,
)
from legit_worker.errors import BackendError

logger = logging.getLogger(__name__)

#: Items of one batch of a trial, as the library's own `encode` has.
BATCH = 32

#: The least cosine with which `auto` takes a backend.
LEAST_COSINE = 0.9999

#: The least cosine of a backend that was chosen, by `DTYPE`. Below it, the conversion is wrong, and not just less
#: precise: for bfloat16 0.9999 is usual. MiniLM has 0.966 in int8 (nncf 3.4).
LEAST_BY_DTYPE = {"float32": 0.9999, "bfloat16": 0.99, "int8": 0.9}

#: The same for an ONNX file, whose weights may have any precision.
LEAST_OF_FILE = 0.9

#: Of the texts of a validation, a chosen backend is compared on one in this many at each load.
ONE_IN = 4

#: A trial computes all batches this many times on either side, in turn, and the fastest time counts. It stops after
#: this many seconds: a large model computes long enough for one time to tell.
TRIALS, TRIAL_SECONDS = 3, 10.0

#: OpenVINO's one step for attention gives NaN for tokens that may see nothing, as those of padding before a text.
EAGER = 'if it is a decoder that is padded on the left, MODEL_KWARGS={"attn_implementation": "eager"} helps'

#: What is part of a converted model's key, beside its weights: each of them may convert it in another way.
PACKAGES = ("openvino", "torch", "transformers", "sentence-transformers")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the operator chose."""

    backend: str
    dtype: str | None
    #: None is the user's own.
    cache_dir: Path | None
    #: The device that the model's torch weights go to.
    device: str
    #: The model's files on this machine; None if there are none.
    folder: Path | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of a built-in kind. torch has its weights, in float32."""

    kind: str
    #: Whether its rows are scores that rank, and whether it takes pictures.
    is_ranking: bool
    takes_pictures: bool
    module: Any
    #: From a batch's features to its rows, by torch.
    compute: Callable[[dict[str, Any]], Any]
    #: From the features behind the last module to rows.
    finish: Callable[[dict[str, Any]], Any]
    #: Each kind of input, as the features of single items: short and long ones.
    groups: Sequence[Sequence[dict[str, Any]]]
    #: Joins items' features, padded.
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    #: Why it can't be converted, if that is known.
    obstacle: str | None
    #: The type of the weights in its files.
    stored: torch.dtype
    #: Lets torch compute the model as fast as it can.
    tune: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What computes the model."""

    #: None is torch.
    graphs: Graphs | None
    #: For the log.
    reason: str


def choose(wanted: Wanted, subject: Subject) -> Chosen:
    """Return what computes the model. Raises `BackendError` if the operator's choice can't."""
    if wanted.backend == "auto":
        return _tried(wanted, subject)
    try:
        graphs, agreement = _made(wanted, subject, one_in=ONE_IN)
        least = LEAST_OF_FILE if wanted.backend == "onnx" else LEAST_BY_DTYPE[graphs.dtype]
        if agreement.worst_cosine < least:
            raise BackendError(
                f"{graphs.dtype} results differ from torch's, worst cosine {agreement.worst_cosine:.6f} and not {least}"
            )
    except BackendError as error:
        raise BackendError(f"BACKEND={wanted.backend}: {error}. Set this model's BACKEND=torch") from error
    return Chosen(graphs=graphs, reason=f"worst cosine with torch {agreement.worst_cosine:.6f}")


def _made(wanted: Wanted, subject: Subject, one_in: int = 1) -> tuple[Graphs, Agreement]:
    """Return the graphs, and how they agree with torch. Raises `BackendError`, whatever OpenVINO raises."""
    if reason := _obstacle(wanted, subject):
        raise BackendError(reason)
    try:
        dtype = _dtype(wanted, subject)
        is_file = wanted.backend == "onnx"
        graphs = Graphs([_of_file(wanted, subject)], dtype) if is_file else _graphs(wanted, subject, dtype)
        return graphs, compare(subject, graphs, one_in)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"the trial of OpenVINO failed: {type(error).__name__}: {first_line(error)}") from error


def _of_file(wanted: Wanted, subject: Subject) -> Any:
    """The graph of the model's ONNX file. It is not kept: the file is there."""
    file = onnx.find(wanted.folder)
    if len(subject.groups) > 1:
        raise BackendError(f"{file} has one graph, and this model takes images and texts")
    return onnx.read(file, list(subject.module), subject.finish, subject.collate(_two_lengths(subject.groups[0])))


def _tried(wanted: Wanted, subject: Subject) -> Chosen:
    try:
        graphs, agreement = _made(wanted, subject)
        if agreement.worst_cosine < LEAST_COSINE or not agreement.keeps_order:
            order = "" if agreement.keeps_order else ", and another order"
            raise BackendError(f"{graphs.dtype} has a worst cosine of {agreement.worst_cosine:.6f}{order}")
    except BackendError as error:
        _stay(wanted, subject)
        return Chosen(graphs=None, reason=f"auto stays with torch: {error}")
    gain = _gain(wanted, subject, graphs)
    figures = f"openvino takes {1 / gain:.2f} of torch's time, worst cosine {agreement.worst_cosine:.6f}"
    return Chosen(graphs=graphs if gain > 1 else None, reason=f"auto: {figures}")


def _obstacle(wanted: Wanted, subject: Subject) -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed in this Python: pip install 'legit-worker[openvino]'"
    if wanted.device != "cpu":
        return f"openvino computes on the CPU, and this worker's device is {wanted.device}"
    if subject.obstacle:
        return subject.obstacle
    dtype = wanted.dtype or "auto"
    if dtype not in (*PRECISIONS, "auto"):
        return f"openvino computes {', '.join(PRECISIONS)}, and not DTYPE={dtype}"
    if dtype == "bfloat16" and not has_bfloat16():
        return "this CPU has no bfloat16"
    if dtype == "int8" and subject.takes_pictures:
        return "int8 needs texts for its calibration, and this model takes images"
    if dtype == "int8" and importlib.util.find_spec("nncf") is None:
        return "DTYPE=int8 needs nncf, which is not installed in this Python: pip install nncf"
    return None


def _dtype(wanted: Wanted, subject: Subject) -> str:
    """The operator's; else the files' own if this CPU has it, and float32 else, which is as exact."""
    if wanted.dtype in PRECISIONS:
        return str(wanted.dtype)
    return "bfloat16" if subject.stored is torch.bfloat16 and has_bfloat16() else "float32"


def _graphs(wanted: Wanted, subject: Subject, dtype: str) -> Graphs:
    """The model's graphs, from the cache if they are there. Raises `BackendError`."""
    cache, key = Cache(wanted.cache_dir), _key(subject, dtype)
    entry = cache.read(key)
    converted: list[Any] = []
    if entry is None:
        logger.info(
            "the model in %s is converted for OpenVINO, in %s: some seconds, or minutes if it is large",
            wanted.folder,
            dtype,
        )
        converted = _convert(subject, dtype)
        entry = cache.write(key, lambda folder: _save(converted, folder))
    if entry is not None:  # read from the file, whose pages need no memory of their own
        converted = [core().read_model(file) for file in sorted(entry.glob("*.xml"))]
    return Graphs(converted, dtype)


def _convert(subject: Subject, dtype: str) -> list[Any]:
    made = []
    for group in subject.groups:
        graph = convert(subject.module, subject.compute, subject.collate(_two_lengths(group)))
        made.append(quantized(graph, list(_batches(subject, group))) if dtype == "int8" else graph)
    return made


def _two_lengths(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two items that are padded, so that a trace can't take their length for any batch's."""
    by_length = sorted(group, key=_length)
    return [by_length[len(by_length) // 4], by_length[3 * len(by_length) // 4]]


def _length(features: Features) -> int:
    ids = features.get("input_ids")
    return 0 if ids is None else len(ids[0]) if isinstance(ids, torch.Tensor) else len(ids)


def _save(graphs: Sequence[Any], folder: Path) -> None:
    for number, graph in enumerate(graphs):
        library().save_model(graph, folder / f"{number}.xml", compress_to_fp16=False)


def _key(subject: Subject, dtype: str) -> str:
    """A digest of all that a converted model depends on: the weights, the modules, the packages that convert it."""
    digest = hashlib.sha256(f"{subject.kind} {dtype} {[version(package) for package in PACKAGES]}".encode())
    digest.update(repr(subject.module).encode())
    for module in subject.module.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_json_string"):
            attention = getattr(config, "_attn_implementation", None)  # which the JSON leaves out
            digest.update(f"{config.to_json_string()} {attention}".encode())
    for name, tensor in sorted(subject.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:40]


def _batches(subject: Subject, group: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    by_length = sorted(group, key=_length)
    for start in range(0, len(by_length), BATCH):
        yield subject.collate(by_length[start : start + BATCH])


def compare(subject: Subject, graphs: Graphs, one_in: int = 1) -> Agreement:
    """Compare the graphs' results with torch's, on every item or on one in several.

    Raises `BackendError` if only the graphs have numbers that are not finite.
    """
    found = []
    for group in subject.groups:
        batches = list(_batches(subject, group[::one_in]))
        with torch.inference_mode():
            expected = torch.cat([subject.compute(dict(batch)) for batch in batches]).float().numpy()
        rows = torch.cat([graphs.compute(batch) for batch in batches]).float().numpy()
        if np.isfinite(expected).all() and not np.isfinite(rows).all():
            raise BackendError(f"{graphs.dtype} results are not finite: {EAGER}")
        found.append((of_scores if subject.is_ranking else of_vectors)(expected, rows))
    worst = min(one.worst_cosine for one in found)
    return Agreement(worst_cosine=worst, keeps_order=all(one.keeps_order for one in found))


def _stay(wanted: Wanted, subject: Subject) -> None:
    """torch computes the model, as if nothing had been tried."""
    named = getattr(torch, wanted.dtype or "", None)
    subject.module.to(named if isinstance(named, torch.dtype) else subject.stored)
    subject.tune()


def _gain(wanted: Wanted, subject: Subject, graphs: Graphs) -> float:
    """How many times as fast as torch the graphs compute, both at their best."""
    _stay(wanted, subject)
    batches = [batch for group in subject.groups for batch in _batches(subject, group)]

    @torch.inference_mode()
    def by_torch() -> float:
        return _seconds(lambda: [subject.compute(dict(batch)) for batch in batches])

    def by_graphs() -> float:
        return _seconds(lambda: [graphs.compute(batch) for batch in batches])

    until = perf_counter() + TRIAL_SECONDS
    times = [(by_torch(), by_graphs())]
    while len(times) < TRIALS and perf_counter() < until:
        times.append((by_torch(), by_graphs()))
    return min(one for one, _ in times) / min(other for _, other in times)


def _seconds(computing: Callable[[], object]) -> float:
    start = perf_counter()
    computing()
    return perf_counter() - start
