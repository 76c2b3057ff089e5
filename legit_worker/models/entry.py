"""One configured model: its weights, and how items are computed with it.

In: the settings of a model. Out: its weights, loaded at most once, on the loader thread; and launches of batches.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import monotonic
from typing import Any

from kombu.utils.imports import symbol_by_name

from legit_worker import settings
from legit_worker.batching.costmodel import BYTES_PRIOR, ENOUGH, CostModel
from legit_worker.device.cpu import give_back_freed
from legit_worker.device.cuda import cuda_device
from legit_worker.device.devices import Device, Launch
from legit_worker.device.memory import give_back_cached
from legit_worker.device.simulated import simulated_device
from legit_worker.errors import DeviceLostError, LegitWorkerError, ModelLoadError
from legit_worker.models.calibration import calibrate
from legit_worker.models.methods import Methods
from legit_worker.models.protocol import Model
from legit_worker.models.residency import NotNowError, Residency
from legit_worker.models.shelf import Kept, Shelf
from legit_worker.models.simulated import SimulatedModel

logger = logging.getLogger(__name__)

#: The built-in kinds. A kind with a colon is a user's own `module:Class`.
KINDS = {
    "embed": "legit_worker.models.kinds:TextEmbedding",
    "image": "legit_worker.models.kinds:ImageEmbedding",
    "sparse": "legit_worker.models.kinds:SparseEmbedding",
    "rerank": "legit_worker.models.kinds:Reranker",
    "simulated": "legit_worker.models.simulated:SimulatedModel",
}

#: Seconds for which a failed load answers the next askers, so that a thousand waiting tasks don't read a broken
#: file a thousand times, and a file that is mended is noticed without a restart.
LOAD_RETRY_AFTER = 10.0

#: The cost of the largest item; far beyond any batch's.
MAX_COST = 2**31

#: The batch that there must be room for beside the weights, as (items, cost of each): a GPU is busy enough with it.
RESERVE = (16, 256)

#: Activations count for this many times what is predicted: allocators round up, and a fit goes through the middle.
MARGIN = 1.2

#: The largest batch, in padded cost units, of a model whose activations were never measured.
UNMEASURED_COST = 16_384


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

    def __init__(
        self, alias: str, spec: settings.ModelSettings, device: Callable[[], str], loader: Loader, shelf: Shelf
    ) -> None:
        self.alias = alias
        self.spec = spec
        self._device_name = device
        self._loader = loader
        self._shelf = shelf
        #: Where it is, once it was loaded.
        self._device = Device("nowhere")
        self._future: Future[Model] | None = None
        self._failed_at = 0.0
        # Held while `_future` changes.
        self._lock = threading.Lock()
        # Threads other than the engine's may call the model directly.
        self._methods = Methods(alias)
        #: Bytes of its weights: as its files have them, and once it was loaded as they are in memory.
        self.size = estimate(spec)
        #: Requests that have it now, and when one last had it. Kept by `Residency`, as are the next two.
        self.users = 0
        self.used_at = 0.0
        #: When it was last loaded, how long that took, and how often it was.
        self.loaded_at = 0.0
        self.load_seconds = 0.0
        self.loads = 0
        #: Bytes of activations that a batch takes, measured at the load and corrected by the batches that ran.
        self.activations = CostModel(BYTES_PRIOR, enough=ENOUGH)
        self._is_calibrated = False

    def __repr__(self) -> str:
        return f"<Entry {self.alias} ({self.spec.kind}): {self.state}>"

    def use_loader(self, loader: Loader) -> None:
        """Load by this loader from now on, and forget a load that another process had begun."""
        self._loader, self._lock, self._methods = loader, threading.Lock(), Methods(self.alias)
        if self.state != "resident":
            self._future = None

    @property
    def state(self) -> str:
        """`unloaded`, `loading`, `resident` or `failed`."""
        future = self._future  # which another thread may replace between two looks
        if future is None:
            return "unloaded"
        if not future.done():
            return "loading"
        error = future.exception()
        if isinstance(error, NotNowError):
            return "unloaded"
        return "failed" if error else "resident"

    def load(self) -> Future[Model]:
        """The model, now or soon. Fails with `ModelLoadError`; asked again after a while, it tries again."""
        with self._lock:
            if self._future is None or self._may_retry(self._future):
                self._future = self._loader.submit(self._load)
            return self._future

    def unload(self, *, keep: bool = False) -> None:
        """Take the weights, which nobody uses, off the device. `keep` says that they may wait in the host's memory."""
        with self._lock:
            if keep and self._device.tells_memory:
                self._shelf.put(self.alias, Kept(model=self.model_now, size=self.size))
            else:
                self._shelf.forget(self.model_now)
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
        future = self._future
        return None if future is None else future.exception(timeout=0)

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
        """What a request's future has; waits for it. Raises `ModelLoadError`, `DeviceLostError`."""
        error = future.exception()
        if error is not None:
            # One of its own for each asker: tasks that share an exception would share its traceback.
            raise type(error)(*error.args) from error.__cause__
        return future.result()

    def batch_key(self, prepared: Any) -> Hashable:
        """What must be equal for two items to share a batch. Raises `TypeError` where the model's key is no key."""
        key_of = getattr(self.model_now, "batch_key", None)
        key: Hashable = None if key_of is None else self._methods.at_once("batch_key", key_of, prepared)
        hash(key)
        return key

    def cost(self, prepared: Any) -> int:
        """The model's cost of a preprocessed item, at least 1, and small enough for the packer's arithmetic."""
        return min(max(1, int(self._methods.at_once("cost", self.model_now.cost, prepared))), MAX_COST)

    def postprocess(self, output: Any) -> Any:
        """What the task receives for this output. Raises what the model raises."""
        return self._methods.at_once("postprocess", self.model_now.postprocess, output)

    def preprocess(self, item: Any) -> Any:
        """The loaded model's `preprocess`. Raises what that raises."""
        return self._methods.alone("preprocess", self.model_now.preprocess, item)

    def alone(self, name: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of the model while no other thread does: tokenizers and modules keep state."""
        return self._methods.alone(name, method, *arguments)

    @property
    def reserve(self) -> int:
        """Bytes to have beside the weights for its batches; 0 until it was loaded and measured once."""
        return int(MARGIN * self.activations.predict(*RESERVE)) if self.activations.is_known else 0

    def largest_cost(self, longest: int) -> int:
        """The largest padded cost of a batch whose longest item costs so much, by the memory that there is now.

        Longer items take more for each unit: it is less for them.
        """
        room = self.residency.room_for_activations()
        if room is None or not self.activations.is_known:
            return UNMEASURED_COST
        return longest * self.activations.largest(longest, room / MARGIN)

    def is_lost(self, error: BaseException) -> bool:
        """Whether this error of a batch broke the device for this process."""
        return self._device.is_lost(error)

    def forward(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Compute a batch and wait for it. Raises what the model raises."""
        model = self.model_now
        with self._methods.lock:
            outputs: Sequence[Any] = self._compute(model, batch).outputs
        return outputs

    def launch(self, batch: Sequence[Any]) -> Launch:
        """Hand a batch to the device: one output per item. Raises what the model raises."""
        model = self.model_now
        was_loading = self.residency.is_loading()
        with self._methods.lock:
            launch = self._device.launch(lambda: self._checked(model, batch))
        if was_loading or self.residency.is_loading():  # whose bytes are in the peak, too
            launch.peak = None
        return launch

    def observe(self, count: int, longest: int, launch: Launch) -> None:
        """A batch is over: learn from it where it took more memory than was expected of it."""
        if not launch.peak:
            return
        if not self.activations.is_known or launch.peak > self.activations.predict(count, longest):
            self.activations.observe(count, longest, launch.peak)

    def _checked(self, model: Model, batch: Sequence[Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = self._methods.at_once("forward", model.forward, batch)
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
        if not future.done() or future.exception() is None:
            return False
        return isinstance(future.exception(), NotNowError) or monotonic() - self._failed_at > LOAD_RETRY_AFTER

    def _load(self) -> Model:
        start = monotonic()
        model: Any = None
        try:
            self._device = device_of("simulated" if self.spec.kind == "simulated" else self._device_name())
            # Before the turn: a first import of torch and of a library on it takes many seconds.
            cls = symbol_by_name(KINDS.get(self.spec.kind, self.spec.kind))
            with self.residency.turn():
                self.residency.check_room(self)
                with self._device.loading():
                    model = self._bring(cls)
                self.size = int(model.memory()) if hasattr(model, "memory") else self.size
                self.residency.hold()
                # Where batches run: torch's allocator keeps what it freed for the stream that it was for.
                self._calibrate(model)
        except NotNowError:
            raise
        except Exception as error:
            self._failed_at = monotonic()
            is_lost = self._device.is_lost(error)
            # Or the error, which is kept, would keep the weights on the device.
            traceback.clear_frames(error.__traceback__)
            model = None
            if is_lost:
                raise DeviceLostError(f"model {self.alias!r} was to be loaded on a lost device: {error}") from error
            refused = ModelLoadError(
                f"model {self.alias!r} (kind {self.spec.kind}, path {self.spec.path}) could not be loaded: "
                f"{type(error).__name__}: {error}"
            )
            # The tasks that asked for it are logged with the traceback.
            logger.error("%s", refused)
            raise refused from error
        give_back_freed()
        self.loaded_at = self.used_at = monotonic()
        self.load_seconds, self.loads = self.loaded_at - start, self.loads + 1
        logger.info(
            "model %r loaded on %s in %.1f s, %.0f MiB",
            *(self.alias, self._device.name, self.load_seconds, self.size / 2**20),
        )
        return model  # type: ignore[no-any-return]

    def _bring(self, cls: Any) -> Model:
        """From the host's memory where it is there, else from its files; after those that leave have left."""
        model: Model | None = self._shelf.take(self.alias)
        self._shelf.clear_device()
        if model is None:
            model = self._construct(cls)
            self._methods.at_once("load", model.load, self._device.name)
        else:
            model.to(self._device.name)  # type: ignore[attr-defined]  # or it would not have been kept
        return model

    def _calibrate(self, model: Any) -> None:
        """Measure what batches take, where the device tells, the model has samples, and it was not done before."""
        if self._device.tells_memory and hasattr(model, "sample") and not self._is_calibrated:
            compute = functools.partial(self._compute, model)
            self._is_calibrated = calibrate(self.alias, model, compute, self.activations)
            give_back_cached()  # the next batch may be a small one, and other processes may want the rest

    def _compute(self, model: Model, batch: Sequence[Any]) -> Launch:
        """A batch, and its end. Raises what the model raises."""
        launch = self._device.launch(lambda: self._checked(model, batch))
        launch.wait()
        if launch.error is not None:
            raise launch.error
        return launch

    def _construct(self, cls: Any) -> Model:
        offered = {
            "alias": self.alias,
            "path": self.spec.path,
            "dtype": self.spec.dtype,
            "revision": self.spec.revision,
        }
        wanted = inspect.signature(cls).parameters
        model: Model = cls(**{name: value for name, value in offered.items() if name in wanted})
        return model


def device_of(name: str) -> Device:
    """The device of that name: `cpu`, `cuda`, `cuda:N` or `simulated`."""
    if name.startswith("cuda"):
        return cuda_device(name)
    return simulated_device() if name == "simulated" else Device(name)


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
