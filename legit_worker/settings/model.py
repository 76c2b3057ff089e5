"""The settings of one model, and which of them go together.

In: what a variable or the file says of a model. Out: a frozen `ModelSettings`, or pydantic's error.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from legit_worker.settings.values import (
    DENSE_KINDS,
    DTYPES_OF,
    KINDS_WITH_PATH,
    Kind,
    Options,
    Seconds,
    Some,
    at_home,
    no_switch,
)

#: Settings of a model that mean something to the library alone, and those that fewer kinds have.
OF_LIBRARY = (
    *("local_files_only", "trust_remote_code", "model_kwargs", "processor_kwargs", "prompt_name", "prompt"),
    *("max_seq_length", "cuda_graphs", "torchscript"),
)
OPTIONS_OF = {
    "task": ("embed", "image", "sparse", "multi"),
    **dict.fromkeys(("dimensions", "precision"), DENSE_KINDS),
    "normalize": (*DENSE_KINDS, "multi"),
}

#: Arguments of the readers that have settings of their own, and those that the engine decides. The library's own values
#: of these give way to the readers' arguments, so `trust_remote_code` here would run code that no setting allows.
TAKEN = {
    **dict.fromkeys(("dtype", "torch_dtype"), "set DTYPE"),
    **dict.fromkeys(("device", "device_map"), "LEGIT_WORKER_DEVICE says where models run"),
    "trust_remote_code": "set TRUST_REMOTE_CODE",
    **dict.fromkeys(("revision", "_commit_hash"), "set REVISION"),
    "code_revision": "REVISION pins the code, too",
    "pretrained_model_name_or_path": "set PATH",
    "local_files_only": "set LOCAL_FILES_ONLY",
    **dict.fromkeys(("token", "use_auth_token"), "set HF_TOKEN in the environment"),
    "cache_dir": "set HF_HOME in the environment",
}


class Group(BaseModel):
    """The settings of one model, one app or one worker."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    _no_switch = field_validator("*", mode="before")(no_switch)


class ModelSettings(Group):
    """One model: `LEGIT_WORKER_MODELS__<ALIAS>__…`."""

    #: What kind of model it is: `embed`, `rerank`, `sparse`, `multi`, `image`, `simulated`, or a class of your own as
    #: `module:Class`.
    kind: Kind = "embed"
    #: A folder, or a name in the local Hugging Face cache or on the Hub. A class of your own may give it another
    #: meaning.
    path: str | None = Field(default=None, validate_default=True)
    #: Whether to load it before the worker is ready, and never evict it.
    pin: bool = False
    #: Seconds without a call after which it is evicted, unless it is pinned. If it is not set, the model stays until
    #: another one needs its memory.
    keep_alive: Seconds | None = None
    #: What computes it: torch; OpenVINO on a CPU, by the model's torch modules or, with `onnx`, by its ONNX file;
    #: `auto`: the faster of torch and OpenVINO.
    backend: Literal["torch", "openvino", "onnx", "auto"] = "torch"
    #: The type of its weights; the one of the files if it is not set, and with `auto`. `tf32`: float32, whose products
    #: a GPU rounds to TF32. `int8`: OpenVINO's products of 8 bits.
    dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16", "int8"] | None = None
    #: Whether small batches of texts are recorded as CUDA graphs on a GPU, so that one call launches a batch.
    cuda_graphs: bool = True
    #: Whether batches of texts on a CPU compute no padding, and a small model's run as TorchScript: without Python, and
    #: beside the main thread.
    torchscript: bool = True
    #: The branch, tag or commit on the Hub; the newest if it is not set.
    revision: str | None = None
    #: Whether to read the model from this machine alone, and never ask the Hub.
    local_files_only: bool = False
    #: Whether Python code of the model's repository may run in the worker. One of the Hub needs a commit as REVISION.
    trust_remote_code: bool = Field(default=False, validate_default=True)
    #: More arguments for the library that reads the weights, as JSON.
    model_kwargs: Options = Field(default_factory=dict)
    #: More arguments for the library that reads the tokenizer or the image processor, as JSON.
    processor_kwargs: Options = Field(default_factory=dict)
    #: What texts are, if a call does not say it: the model reads queries and documents in different ways.
    task: Literal["query", "document"] | None = None
    #: What stands before each text, if a call does not say it: one of the model's own prompts, by its name.
    prompt_name: str | None = None
    #: What stands before each text, if a call does not say it: this text.
    prompt: str | None = None
    #: The first numbers of each vector that are kept, no more than it has; all if it is not set.
    dimensions: Some | None = None
    #: How the numbers of a vector are written; as `float32`, or as the model computes them, if it is not set.
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] | None = None
    #: Whether each vector gets the length 1; as the model gives it if it is not set.
    normalize: bool | None = None
    #: The most tokens of a text that are read; the model's own limit if it is not set.
    max_seq_length: Some | None = None

    @field_validator("path")
    @classmethod
    def _is_given(cls, path: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("kind")
        if not path and kind in KINDS_WITH_PATH:
            raise ValueError(f"a model of kind {kind!r} needs a path: a folder, or a name on the Hugging Face Hub")
        return None if path is None else str(at_home(path)) if kind in KINDS_WITH_PATH else path

    @field_validator("trust_remote_code")
    @classmethod
    def _is_pinned(cls, trusts: bool, info: ValidationInfo) -> bool:
        revision = info.data.get("revision") or ""
        path = info.data.get("path") or ""
        is_folder = os.path.isabs(path) or os.path.isdir(path)  # one that only the worker's machine may have
        if trusts and not is_folder and not re.fullmatch("[0-9a-f]{40}", revision):
            raise ValueError(
                "code from the Hub runs here only if REVISION is a commit, 40 hex digits: read the code of that commit "
                "first, since a branch or a tag may change later"
            )
        return trusts

    @field_validator(*OF_LIBRARY, "task", "dimensions", "precision", "normalize")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kind, name = info.data.get("kind"), info.field_name or ""
        allowed = OPTIONS_OF.get(name, KINDS_WITH_PATH)
        if value not in (None, False, {}) and kind not in (*allowed, None):
            raise ValueError(f"kind {kind!r} has no {name}: only {', '.join(allowed)} have")
        return value

    @field_validator("prompt")
    @classmethod
    def _is_the_only_one(cls, prompt: str | None, info: ValidationInfo) -> str | None:
        if prompt is not None and info.data.get("prompt_name") is not None:
            raise ValueError("a model has PROMPT or PROMPT_NAME, not both")
        return prompt

    @field_validator("model_kwargs", "processor_kwargs")
    @classmethod
    def _leaves_the_rest(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, setting in TAKEN.items():
            if name in options:
                raise ValueError(f"{name} is not taken from here: {setting}")
        return options

    @field_validator("backend")
    @classmethod
    def _is_of_a_built_in_kind(cls, backend: str, info: ValidationInfo) -> str:
        kind = info.data.get("kind")
        if backend != "torch" and kind not in (*KINDS_WITH_PATH, None):
            raise ValueError(f"kind {kind!r} computes by itself: only {', '.join(KINDS_WITH_PATH)} have other backends")
        return backend

    @field_validator("dtype")
    @classmethod
    def _is_of_the_backend(cls, dtype: str | None, info: ValidationInfo) -> str | None:
        backend = info.data.get("backend")
        allowed = DTYPES_OF.get(backend or "", ())
        if dtype is not None and allowed and dtype not in allowed:
            raise ValueError(f"backend {backend!r} computes {', '.join(allowed)}")
        return dtype
