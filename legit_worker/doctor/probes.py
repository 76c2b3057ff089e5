"""The parts of `celery legit doctor` with their own process: `python -m legit_worker.doctor.probes NAME [ALIAS]`.

In: the environment. Out: one line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from legit_worker import golden

#: What the class of a model has at least.
METHODS = ("load", "preprocess", "cost", "forward", "postprocess")

#: Texts of mixed lengths, so that a batch is padded. They are few and short, so a model's load takes longer than they.
TEXTS = [" ".join(f"word{place}" for place in range(1 + number * 7 % 20)) for number in range(8)]


def torch_gpus() -> dict[str, Any]:
    """Return the GPUs that torch shows. Opens a CUDA context if there is a GPU."""
    import torch

    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(number) for number in range(count)]
    known = all(hasattr(one, "uuid") for one in properties)
    uuids = [str(one.uuid) for one in properties] if known else None
    return {"version": torch.__version__, "count": count, "uuids": uuids}


def prep(alias: str = "") -> dict[str, Any]:
    """Let role prep work. Returns which of CUDA's libraries it has loaded, and whether CUDA was refused to it."""
    from celery import Celery

    import legit_worker
    from legit_worker import prep_tasks
    from legit_worker.errors import CudaForbiddenError

    legit_worker.install(Celery(set_as_current=False))
    did = "tokenizing" if alias and isinstance(prep_tasks.prep_text(TEXTS, alias), list) else "no model to prepare for"
    mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    driver = sorted({line.split()[-1] for line in mapped.splitlines() if "libcuda" in line})
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
        refused = False
    except CudaForbiddenError:
        refused = True
    except OSError:
        refused = False
    return {"did": did, "driver": driver, "refused": refused}


def own_class(kind: str) -> dict[str, Any]:
    """Import the class of a kind that is not built in. Returns what is wrong with it, or nothing."""
    from legit_worker.models.loader import class_of

    try:
        found = class_of(kind)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    missing = [name for name in METHODS if not callable(getattr(found, name, None))]
    return {"error": f"it has no {', '.join(missing)}"} if missing else {}


def batches(*aliases: str) -> dict[str, dict[str, Any]]:
    """Compare each model's rows of inputs alone and in a batch, and its inputs a second; or return its error."""
    return {alias: _tried(alias) for alias in aliases}


def _tried(alias: str) -> dict[str, Any]:
    from legit_worker.errors import LegitWorkerError
    from legit_worker.models.registry import default_registry

    try:
        return _batches(alias)
    except LegitWorkerError as error:
        return {"error": str(error)}
    except Exception as error:  # of the library; the other models are tried all the same
        return {"error": f"model {alias!r}: {type(error).__name__}: {error}"}
    finally:
        default_registry().residency.unload(default_registry().get(alias))


def _batches(alias: str) -> dict[str, Any]:
    import legit_worker
    from legit_worker.models.registry import default_registry

    handle = legit_worker.model(alias)
    items, of = _inputs(handle.slot.spec.kind)
    for _ in range(2):  # the first run loads the model, and the libraries choose kernels for each shape
        start = perf_counter()
        together = handle.map(items)
        middle = perf_counter()
        alone = [handle.map([item])[0] for item in items]
        end = perf_counter()
    loaded = default_registry().get(alias).model
    return {
        "device": default_registry().device(),
        "backend": loaded.backend.get("backend") if loaded else None,
        "cosine": min(map(_cosine, together, alone)),
        "of": of,
        "batched": len(items) / (middle - start),
        "alone": len(items) / (end - middle),
    }


def _inputs(kind: str) -> tuple[list[Any], str]:
    """Return what a model of this kind is tried with, and what that is."""
    if kind == "rerank":
        return [(TEXTS[0], text) for text in TEXTS], "pairs"
    return (golden.pictures(), "images") if kind == "image" else (list(TEXTS), "texts")


def _cosine(one: Any, other: Any) -> float:
    """Compare two rows. A sparse one is its places and its values; one of several vectors is compared as a whole."""
    import numpy as np

    if isinstance(one, tuple):
        width = 1 + max((int(place) for places, _ in (one, other) for place in places), default=0)
        one, other = (np.bincount(places, values, width) for places, values in (one, other))
    if np.shape(one) != np.shape(other):
        return 0.0
    first, second = (np.ravel(row).astype(np.float64) for row in (one, other))
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length else float(np.array_equal(first, second))


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch_gpus": torch_gpus,
    "prep": prep,
    "own_class": own_class,
    "batches": batches,
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
