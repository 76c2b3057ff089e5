"""Arguments of the library's `encode` and `predict` that change nothing here, and those that are refused.

In: what a task passed beside the arguments that a kind knows. Out: an error that says why, or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

#: They say how to compute, which the engine decides.
IGNORED = frozenset({"batch_size", "show_progress_bar", "convert_to_numpy", "chunk_size"})

#: Arguments that are looked at, and refused for some values.
LOOKED_AT = frozenset({"convert_to_tensor", "output_value", "device", "pool"})


def refuse(options: Mapping[str, Any], method: str, **counts: Any) -> None:
    """Raise `ValueError` or `TypeError`, with the reason, for what `method` can't do. `counts` are above 0, or None."""
    if options.get("convert_to_tensor") or options.get("convert_to_numpy") is False:
        raise ValueError(
            "tensors are refused: a task that keeps one would hold device memory that the engine counts as free; "
            "the result is a numpy array, and torch.from_numpy() makes it a CPU tensor without a copy"
        )
    if options.get("output_value", "sentence_embedding") != "sentence_embedding":
        raise ValueError(f"output_value={options['output_value']!r} is refused: only sentence embeddings are batched")
    if options.get("pool") is not None or isinstance(options.get("device"), list | tuple):
        raise ValueError(
            "pools and lists of devices are refused: the worker computes on the one device of LEGIT_WORKER_DEVICE; "
            "for more devices, start one worker for each"
        )
    for name, count in counts.items():
        if count is not None and not isinstance(count, Integral):
            raise TypeError(f"{name}={count!r} should be a whole number, or None for all")
        if count is not None and count < 1:
            left = "tokens" if name == "max_seq_length" else "numbers"
            raise ValueError(f"{name}={count} would leave no {left}: give at least 1, or None for all")
    unknown = sorted(set(options) - IGNORED - LOOKED_AT)
    if unknown:
        raise TypeError(f"{method}() takes no {', '.join(unknown)}")


#: Why a handle lacks an attribute that the library's objects have.
_MANY_PROCESSES = "the worker shares its device among tasks; for more devices, start one worker for each"
_PLACEMENT = "LEGIT_WORKER_DEVICE and DTYPE say where and as what a model computes"
_TOKENS = (
    "its tensors fit no batch here; check_length() compares a text with the model's limit, and "
    "transformers.AutoTokenizer.from_pretrained() of the model's path tokenizes without the model"
)
_UNKNOWN = "a handle computes, and does not train, save or change a model"
LACKS: Mapping[str, str] = {
    **dict.fromkeys(("tokenize", "preprocess", "tokenizer", "processor"), _TOKENS),
    **dict.fromkeys(
        ("start_multi_process_pool", "stop_multi_process_pool", "encode_multi_process", "predict_multi_process"),
        _MANY_PROCESSES,
    ),
    **dict.fromkeys(("to", "cpu", "cuda", "half", "float", "bfloat16", "device", "dtype", "compile"), _PLACEMENT),
    **dict.fromkeys(("fit", "train", "eval", "save", "save_pretrained", "push_to_hub", "forward"), _UNKNOWN),
    "truncate_sentence_embeddings": "give encode() truncate_dim, or the alias DIMENSIONS",
}

#: What to do in place of setting an attribute that changes the results of the library's objects.
SET_BY: Mapping[str, str] = {
    **dict.fromkeys(("max_seq_length", "max_length"), "give the call max_seq_length, or the alias MAX_SEQ_LENGTH"),
    "truncate_dim": "give encode() truncate_dim, or the alias DIMENSIONS",
    "prompts": "give the call a prompt, or the alias PROMPT",
    "default_prompt_name": "give the call a prompt_name, or the alias PROMPT_NAME",
}
