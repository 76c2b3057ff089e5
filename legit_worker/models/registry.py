"""Which models there are, and their weights.

In: the settings' models. Out: `Entry` objects, one per alias, each loaded at most once, on the loader thread.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from kombu.utils.imports import symbol_by_name

from legit_worker import settings
from legit_worker.device import cuda, vram
from legit_worker.errors import LegitWorkerError, ModelLoadError, UnknownModelError
from legit_worker.models.protocol import Model
from legit_worker.models.residency import Residency
from legit_worker.models.simulated import SimulatedModel

logger = logging.getLogger(__name__)

#: The built-in kinds. A kind with a colon is a user's own `module:Class`.
KINDS = {
    "embed": "legit_worker.models.sentence:TextEmbedding",
    "image": "legit_worker.models.sentence:ImageEmbedding",
    "sparse": "legit_worker.models.sentence:SparseEmbedding",
    "rerank": "legit_worker.models.sentence:Reranker",
    "simulated": "legit_worker.models.simulated:SimulatedModel",
}

#: Seconds for which a failed load answers the next askers, so that a thousand waiting tasks don't read a broken
#: file a thousand times, and a file that is mended is noticed without a restart.
LOAD_RETRY_AFTER = 10.0


#: The cost of the largest item; far beyond any batch's.
MAX_COST = 2**31


class Loader:
    """Loads one model at a time, each on a thread that ends with its load.

    torch's own threads live as long as the thread that first needed them. Two sets of them on one machine's cores would
    make every parallel step of the main thread's wait longer: three milliseconds in a lone text's twelve. A daemon, so
    that a worker that is told to stop need not wait for weights that nobody will use.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def submit(self, load: Callable[[], Model]) -> Future[Model]:
        """Begin to load, when it is this model's turn."""
        future: Future[Model] = Future()
        threading.Thread(target=self._run, args=(load, future), name="legit-loader", daemon=True).start()
        return future

    def _run(self, load: Callable[[], Model], future: Future[Model]) -> None:
        with self._turn:
            try:
                future.set_result(load())
            except BaseException as error:
                future.set_exception(error)


class Entry:
    """One configured model. Any thread may ask for it; its weights are read on the loader thread only."""

    #: Who decides when it is in memory. Set by `Registry`.
    residency: Residency

    def __init__(self, alias: str, spec: settings.ModelSettings, device: Callable[[], str], loader: Loader) -> None:
        self.alias = alias
        self.spec = spec
        self._device = device
        self._loader = loader
        self._future: Future[Model] | None = None
        self._failed_at = 0.0
        #: Held during `forward`: threads other than the engine's may call the model directly.
        self._lock = threading.Lock()
        #: Bytes of its weights: as its files have them, and once it was loaded as they are in memory.
        self.size = estimate(spec)
        #: Requests that have it now, and when one last had it. Kept by `Residency`, as are the next two.
        self.users = 0
        self.used_at = 0.0
        #: When it was last loaded, how long that took, and how often it was.
        self.loaded_at = 0.0
        self.load_seconds = 0.0
        self.loads = 0

    def __repr__(self) -> str:
        return f"<Entry {self.alias} ({self.spec.kind}): {self.state}>"

    def use_loader(self, loader: Loader) -> None:
        """Load by this loader from now on, and forget a load that another process had begun."""
        self._loader, self._lock = loader, threading.Lock()
        if self.state != "resident":
            self._future = None

    @property
    def state(self) -> str:
        """`unloaded`, `loading`, `resident` or `failed`."""
        if self._future is None:
            return "unloaded"
        if not self._future.done():
            return "loading"
        return "failed" if self._future.exception() else "resident"

    def load(self) -> Future[Model]:
        """The model, now or soon. Fails with `ModelLoadError`; asked again after a while, it tries again."""
        with self._lock:
            if self._future is None or self._may_retry(self._future):
                self._future = self._loader.submit(self._load)
            return self._future

    def unload(self) -> None:
        """Forget the weights, which nobody uses."""
        with self._lock:
            self._future = None

    @property
    def is_resident(self) -> bool:
        """Whether its weights are in memory."""
        return self.state == "resident"

    @property
    def is_loading(self) -> bool:
        """Whether they are about to be."""
        return self.state == "loading"

    @property
    def load_error(self) -> BaseException | None:
        """Why its last load failed; None where it did not."""
        return None if self._future is None else self._future.exception(timeout=0)

    @property
    def idle_seconds(self) -> float:
        """Since somebody used it."""
        return monotonic() - self.used_at

    def too_large(self, budget: int) -> ModelLoadError:
        """What those are told who ask for a model that can never be loaded."""
        return ModelLoadError(
            f"model {self.alias!r} has weights of {self.size} bytes, and beside the pinned models only {budget} bytes "
            f"may be taken in all: raise LEGIT_WORKER_VRAM_LIMIT, or unpin a model"
        )

    @staticmethod
    def outcome(future: Future[Model]) -> Model:
        """What a request's future has; waits for it. Raises `ModelLoadError`."""
        error = future.exception()
        if error is not None:
            # One of its own for each asker: tasks that share an exception would share its traceback.
            raise ModelLoadError(*error.args) from error.__cause__
        return future.result()

    def batch_key(self, prepared: Any) -> Hashable:
        """What must be equal for two items to share a batch. Raises `TypeError` where the model's key is no key."""
        key_of = getattr(self.model_now, "batch_key", None)
        key: Hashable = None if key_of is None else key_of(prepared)
        hash(key)
        return key

    def cost(self, prepared: Any) -> int:
        """The model's cost of a preprocessed item, at least 1, and small enough for the packer's arithmetic."""
        return min(max(1, int(self.model_now.cost(prepared))), MAX_COST)

    def preprocess(self, item: Any) -> Any:
        """The loaded model's `preprocess`. Raises what that raises."""
        return self.alone(self.model_now.preprocess, item)

    def alone(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of the model while no other thread does: tokenizers and modules keep state."""
        with self._lock:
            return method(*arguments)

    def forward(self, batch: Sequence[Any]) -> Sequence[Any]:
        """The model's `forward`, checked to give one output per item. Raises what the model raises."""
        outputs: Sequence[Any] = self.alone(self.model_now.forward, batch)
        if len(outputs) != len(batch):
            raise LegitWorkerError(
                f"model {self.alias!r} gave {len(outputs)} outputs for a batch of {len(batch)} items: "
                f"forward() must return one output per item, in order"
            )
        return outputs

    @property
    def model_now(self) -> Model:
        """The model, which is known to be loaded."""
        assert self._future is not None
        return self._future.result(timeout=0)

    def _may_retry(self, future: Future[Model]) -> bool:
        return future.done() and future.exception() is not None and monotonic() - self._failed_at > LOAD_RETRY_AFTER

    def _load(self) -> Model:
        start = monotonic()
        try:
            device = "simulated" if self.spec.kind == "simulated" else self._device()
            model = self._construct()
            with self.residency.turn():
                model.load(device)
            self.size = int(model.memory()) if hasattr(model, "memory") else self.size
        except Exception as error:
            self._failed_at = monotonic()
            logger.exception("model %r could not be loaded", self.alias)
            raise ModelLoadError(
                f"model {self.alias!r} (kind {self.spec.kind}, path {self.spec.path}) could not be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.loaded_at = self.used_at = monotonic()
        self.load_seconds, self.loads = self.loaded_at - start, self.loads + 1
        logger.info("model %r loaded on %s in %.1f s, %d bytes", self.alias, device, self.load_seconds, self.size)
        return model

    def _construct(self) -> Model:
        cls = symbol_by_name(KINDS.get(self.spec.kind, self.spec.kind))
        offered = {
            "alias": self.alias,
            "path": self.spec.path,
            "dtype": self.spec.dtype,
            "revision": self.spec.revision,
        }
        wanted = inspect.signature(cls).parameters
        model: Model = cls(**{name: value for name, value in offered.items() if name in wanted})
        return model


def estimate(spec: settings.ModelSettings) -> int:
    """Bytes of a model's weights before it was ever loaded; 0 where its path does not tell."""
    if spec.kind == "simulated":
        return SimulatedModel(spec.path).memory()
    folder = Path(spec.path or "")
    if not spec.path or not folder.is_dir():
        return 0
    for pattern in ("*.safetensors", "*.bin"):
        sizes = [file.stat().st_size for file in folder.rglob(pattern) if file.is_file()]
        if sizes:
            return sum(sizes)
    return 0


class Registry:
    """All configured models. One per process. `budget`: how many bytes weights may take, from what they take now."""

    def __init__(
        self,
        models: Mapping[str, settings.ModelSettings],
        device: Callable[[], str],
        budget: Callable[[int], int | None] = lambda _: None,
    ) -> None:
        loader = Loader()
        #: Gives the name of the device that models are put on.
        self.device = device
        self.entries = {alias: Entry(alias, spec, device, loader) for alias, spec in models.items()}
        self.residency = Residency(self.entries.values(), budget)
        for entry in self.entries.values():
            entry.residency = self.residency

    def __repr__(self) -> str:
        return f"<Registry {list(self.entries.values())}>"

    def restart_loader(self) -> None:
        """In a forked child, where no load of the parent's will end: loaded models stay, others can be loaded."""
        loader = Loader()
        for entry in self.entries.values():
            entry.use_loader(loader)
        self.residency.restart()

    def get(self, alias: str) -> Entry:
        """The model of this alias, in any case. Raises `UnknownModelError`."""
        entry = self.entries.get(str(alias).lower())
        if entry is None:
            raise UnknownModelError(
                f"no model {alias!r} is configured; there are: {self._names()}. "
                f"Set LEGIT_WORKER_MODELS__{str(alias).upper()}__PATH to add it"
            )
        return entry

    def only(self, kind: str) -> Entry:
        """The one model of this kind. Raises `UnknownModelError` where there is none, or more than one."""
        found = [entry for entry in self.entries.values() if entry.spec.kind == kind]
        if len(found) != 1:
            raise UnknownModelError(
                f"model=None means the one model of kind {kind!r}, and {len(found)} are configured; "
                f"there are: {self._names()}. Name one with model="
            )
        return found[0]

    def _names(self) -> str:
        return ", ".join(f"{alias} ({entry.spec.kind})" for alias, entry in self.entries.items()) or "none"


_making_default = threading.Lock()


def default_registry() -> Registry:
    """This process's models, from its settings. Raises `SettingsError`."""
    with _making_default:  # or two threads that ask at once would each load their own
        return _default_registry()


@functools.cache
def _default_registry() -> Registry:
    chosen = settings.load()
    return Registry(chosen.models, functools.partial(cuda.choose, chosen.device), Budget(chosen))


class Budget:
    """How many bytes the weights may take, of whatever device they are on."""

    def __init__(self, chosen: settings.Settings) -> None:
        self._chosen = chosen
        self._gpu: vram.Gpu | None = None
        self._is_unknown = not chosen.device.startswith(("auto", "cuda"))

    def __call__(self, weights: int) -> int | None:
        """Bytes in all, of which `weights` are taken already; None where nothing bounds them.

        What is free on the GPU now and what the weights have, less the headroom; at most `LEGIT_WORKER_VRAM_LIMIT`.
        Without a GPU, or an NVML that tells, that limit alone.
        """
        limit = self._chosen.vram_limit
        found = self._memory()
        if found is None:
            return None if limit is None or limit.unit == "%" else limit.of(0)
        free = weights + found.free - self._chosen.vram_headroom.of(found.total)
        return max(0, free if limit is None else min(free, limit.of(found.total)))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While a load goes on, no other worker of this machine begins one on the same GPU."""
        if self._memory() is None or self._gpu is None:
            yield
        else:
            with vram.turn(self._gpu):
                yield

    def _memory(self) -> vram.Memory | None:
        """Of the GPU that models are on; None where there is none, or it is unknown."""
        if self._is_unknown:
            return None
        try:
            if self._gpu is None:
                self._gpu = cuda.gpu(self._chosen.device)
            if self._gpu is not None:
                return vram.memory(self._gpu)
        except vram.VramUnknownError as error:
            if self._chosen.device != "auto":
                logger.warning("%s", error)
        self._is_unknown = True
        return None


def _after_fork() -> None:
    global _making_default
    _making_default = threading.Lock()
    if _default_registry.cache_info().currsize:
        _default_registry().restart_loader()


os.register_at_fork(after_in_child=_after_fork)
