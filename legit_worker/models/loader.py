"""Brings models into memory.

In: the slot of a model to load. Out: its `LoadedModel`, or why there is none. Whoever ordered the load is told.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from celery.utils.imports import import_from_cwd
from kombu.utils.imports import symbol_by_name

from legit_worker import parking
from legit_worker.device import modes
from legit_worker.device.cpu import give_back_freed
from legit_worker.device.cuda import cuda_device
from legit_worker.device.devices import Device
from legit_worker.device.memory import give_back_cached, let_go
from legit_worker.device.simulated import simulated_device
from legit_worker.errors import CallsModelError, DeviceLostError, LimitError, ModelLoadError, said
from legit_worker.models import forks
from legit_worker.models.calibration import calibrate
from legit_worker.models.loaded import LoadedModel, Surroundings
from legit_worker.models.methods import Methods
from legit_worker.models.shelf import Shelf
from legit_worker.models.slot import Slot
from legit_worker.models.told import load_is_told
from legit_worker.settings import ModelSettings

logger = logging.getLogger(__name__)

#: The built-in kinds. A kind with a colon is a user's own `module:Class`.
KINDS = {
    "embed": "legit_worker.models.kinds:TextEmbedding",
    "image": "legit_worker.models.kinds:ImageEmbedding",
    "sparse": "legit_worker.models.kinds:SparseEmbedding",
    "multi": "legit_worker.models.multivector:MultiVector",
    "rerank": "legit_worker.models.reranker:Reranker",
    "simulated": "legit_worker.models.simulated:SimulatedModel",
}


class NotNowError(Exception):
    """Another process took the memory that a load counted on, before it had its turn."""


class Orders(Surroundings, Protocol):
    """Whoever orders loads: what a load asks, and what it tells. Called on the loader thread."""

    def turn(self) -> AbstractContextManager[None]:
        """Held while weights are read."""

    def check_room(self, slot: Slot) -> None:
        """Whether the room that the load counted on is still there. Raises `NotNowError`."""

    def sized(self, slot: Slot, size: int | None) -> None:
        """The weights are read and take this many bytes; None: the model does not tell."""

    def loaded(self, slot: Slot, model: LoadedModel, seconds: float) -> None:
        """The model is ready; reading and moving its weights took this long."""

    def failed(self, slot: Slot, error: BaseException) -> None:
        """It is not: `ModelLoadError`, `DeviceLostError` or `NotNowError`."""


class Loads(Protocol):
    """What `Residency` has done by a loader. None of it waits."""

    def start(self, slot: Slot, orders: Orders) -> None:
        """Begin to load, when it is this model's turn."""

    def clear_device(self) -> None:
        """Begin to move what leaves the device, and to give freed memory back: nothing is loaded in its place."""

    def restart(self) -> None:
        """In a forked child, where no load of the parent's will end."""


class Loader:
    """Loads one model at a time, each on a thread that ends with its load.

    torch's own threads live as long as the thread that first needed them. Two sets of them on one machine's cores would
    make every parallel step of the main thread's wait longer: three milliseconds in a lone text's twelve. A daemon, so
    that a worker that is told to stop need not wait for weights that nobody will use.
    """

    def __init__(self, device: Callable[[], str], shelf: Shelf, cache_dir: Path | None = None) -> None:
        self._device_name = device
        self._shelf = shelf
        self._cache_dir = cache_dir
        self._one_at_a_time = threading.Lock()

    def start(self, slot: Slot, orders: Orders) -> None:
        """On a new thread."""
        try:
            _thread(self._run, slot, orders)
        except RuntimeError as error:
            orders.failed(slot, ModelLoadError(f"model {slot.alias!r} could not be loaded: {error}"))

    def clear_device(self) -> None:
        """On a new thread."""
        _thread(self._clear)

    def _clear(self) -> None:
        self._shelf.move()
        give_back_freed()

    def restart(self) -> None:
        """The parent's thread, which may have had the turn, is not here."""
        self._one_at_a_time = threading.Lock()

    def _run(self, slot: Slot, orders: Orders) -> None:
        try:
            with self._one_at_a_time:
                model, seconds = self._load(slot, orders)
        except BaseException as error:
            orders.failed(slot, error)
        else:
            if not slot.loads and parking.keeps_tasks_apart():
                gc.collect()
                gc.freeze()  # its modules and tensors, which every full collection would look at: 10 % of a short task
            orders.loaded(slot, model, seconds)

    def _load(self, slot: Slot, orders: Orders) -> tuple[LoadedModel, float]:
        device = Device("nowhere")
        try:
            device = device_of("simulated" if slot.spec.kind == "simulated" else self._device_name())
            with load_is_told(slot, device.name):
                return self._bring(slot, orders, device)
        except NotNowError:
            raise
        except BaseException as error:  # a user's model may call `sys.exit`
            is_lost = device.is_lost(error)
            let_go(error)  # which is kept, and would keep the weights on the device
            if device.tells_memory and not is_lost:
                gc.collect()  # modules are in cycles
                give_back_cached(device.name)
            if is_lost:
                raise DeviceLostError(
                    f"model {slot.alias!r} was to be loaded on a lost device: {said(error)}"
                ) from error
            raise ModelLoadError(
                f"model {slot.alias!r} (kind {slot.spec.kind}, path {slot.spec.path}) could not be loaded: "
                f"{type(error).__name__}: {said(error)}"
            ) from error

    def _bring(self, slot: Slot, orders: Orders, device: Device) -> tuple[LoadedModel, float]:
        begun = monotonic()
        # Before the turn: a first import of torch and of a library on it takes many seconds.
        with forks.importing():
            cls = class_of(slot.spec.kind)
        with orders.turn():
            orders.check_room(slot)
            with device.loading():  # whose beginning starts CUDA, once
                start = monotonic()
                model = self._read(slot, cls, orders, device)
            seconds = monotonic() - start
            try:
                _check_settings(slot, model)
                orders.sized(slot, model.size)
                _learn_padding(model)
                # Outside `loading`, on the stream of batches: torch's allocator keeps what it freed for that stream.
                _measure(slot, model, device)
            except BaseException:
                model.unload()
                raise
        give_back_freed()
        logger.info(
            "model %r loaded on %s in %.1f s (%.1f s for its weights), %.0f MiB",
            *(slot.alias, device.name, monotonic() - begun, seconds, slot.size / 2**20),
        )
        if slot.spec.backend != "torch":
            found = model.backend
            logger.info("model %r is computed by %s: %s", slot.alias, found["backend"], found["backend_reason"])
        return model, seconds

    def _read(self, slot: Slot, cls: Any, orders: Orders, device: Device) -> LoadedModel:
        """From the host's memory if it is there, else from its files; after those that leave have left."""
        model = self._shelf.take(slot.alias)
        self._shelf.clear_device()
        if model is None:
            own = _construct(cls, slot.alias, slot.spec, self._cache_dir)
            model = LoadedModel(slot.alias, slot.spec.kind, own, device, slot.activations, orders)
            with modes.loading():
                model.load()
        else:
            model.move(to_host=False)
        return model


def _check_settings(slot: Slot, model: LoadedModel) -> None:
    """Raise `LimitError` if the model can't have what its alias asks for. Aliases that share one are told at calls."""
    if len(slot.aliases) == 1:
        _check_limit(slot.spec.max_seq_length, model)
        _check_prompt(slot.spec.prompt_name, model)
        _check_dimensions(slot.spec.dimensions, model)


def _check_limit(limit: int | None, model: LoadedModel) -> None:
    if limit is None:
        return
    try:
        model.alone("check_limit", limit)
    except LimitError as error:
        raise LimitError(f"MAX_SEQ_LENGTH={limit}: {error}") from None


def _check_prompt(name: str | None, model: LoadedModel) -> None:
    if name is not None and name not in (known := model.alone("prompts")):
        raise LimitError(f"PROMPT_NAME={name}: its prompts are {sorted(known)}")


def _check_dimensions(asked: int | None, model: LoadedModel) -> None:
    """Compute one vector to find out."""
    if asked is None:
        return
    has = int(model.compute([model.trial(1)]).outputs[0].shape[-1])
    if has < asked:
        raise LimitError(f"DIMENSIONS={asked}: its vectors have {has} numbers, so ask for no more")


def _thread(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, name="legit-loader", daemon=True).start()


def _learn_padding(model: LoadedModel) -> None:
    """Have a built-in kind find out whether its rows depend on padding. What it can't compute tells nothing."""
    if not model.is_own and model.has("learn_padding"):
        with suppress(Exception):
            model.model.learn_padding(lambda batch: model.compute(batch).outputs)


def _measure(slot: Slot, model: LoadedModel, device: Device) -> None:
    """What batches take, if the device tells, the model has samples, and it was not done before."""
    if device.tells_memory and model.has_samples and not slot.is_calibrated:
        try:
            slot.is_calibrated = calibrate(slot.alias, model, model.compute, slot.activations)
        except CallsModelError:  # whose load would begin when this one has ended
            logger.warning(
                "model %r calls another model to prepare its samples, so there are no trial batches at its load: the "
                "memory that batches need is learned from those that run",
                slot.alias,
            )
        give_back_cached(device.name)  # the next batch may be a small one, and other processes may want the rest


def class_of(kind: str) -> Any:
    """A user's own is looked for where Celery looks for the project: in the working directory, too."""
    return symbol_by_name(KINDS[kind]) if kind in KINDS else symbol_by_name(kind, imp=import_from_cwd)


def _construct(cls: Any, alias: str, spec: ModelSettings, cache_dir: Path | None) -> Any:
    offered = {
        **{"alias": alias, "path": spec.path, "dtype": spec.dtype, "revision": spec.revision},
        **{"backend": spec.backend, "cache_dir": cache_dir, "options": library_options(spec)},
        **{"cuda_graphs": spec.cuda_graphs, "torchscript": spec.torchscript},
    }
    wanted = inspect.signature(cls).parameters
    make = functools.partial(cls, **{name: value for name, value in offered.items() if name in wanted})
    return Methods(alias).at_once("__init__", make)


def library_options(spec: ModelSettings) -> dict[str, Any]:
    """The model's settings that the library's constructor has as arguments, if they were made."""
    names = ("local_files_only", "trust_remote_code", "model_kwargs", "processor_kwargs")
    return {name: value for name in names if (value := getattr(spec, name))}


def device_of(name: str) -> Device:
    """The device of that name: `cpu`, `cuda`, `cuda:N` or `simulated`."""
    if name.startswith("cuda"):
        return cuda_device(name)
    return simulated_device() if name == "simulated" else Device(name)
