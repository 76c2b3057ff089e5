"""What comes before a text, and what an alias asks for unless a call says otherwise. Pure.

In: a model's prompts, a call's options, and the settings of an alias. Out: the prompt that sentence-transformers would
choose, and the call with the defaults filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from legit_worker.errors import InvalidInputError, shown
from legit_worker.settings import DENSE_KINDS, ModelSettings

#: The call for texts of each task, and the names of prompts that it looks for, in this order, as the library does.
CALLS = {"query": "encode_query", "document": "encode_document"}
NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}

#: A call's options, by the settings of an alias that stand in for them.
STAND_INS = {
    "dimensions": "truncate_dim",
    "precision": "precision",
    "normalize": "normalize_embeddings",
    "max_seq_length": "max_seq_length",
}

#: The arguments that a call may give by their place, after its inputs.
BY_PLACE = ("prompt_name", "prompt")


def first_prompt(prompts: Mapping[str, str], task: str) -> str | None:
    """The name of the prompt for a task; None if there is none."""
    return next((name for name in NAMES[task] if name in prompts), None)


def named_prompt(prompts: Mapping[str, str], name: str | None) -> str | None:
    """The prompt of this name; None has none. Raises `InvalidInputError`."""
    if name is None:
        return None
    if name not in prompts:
        raise InvalidInputError(f"prompt_name={shown(name)} is not among this model's prompts: {sorted(prompts)}")
    return prompts[name]


def chosen_prompt(
    prompts: Mapping[str, str], default: str | None, task: str | None, name: str | None, prompt: str | None
) -> str | None:
    """The prompt of a call, as `encode_query`, `encode_document` or, without a task, `encode` choose it."""
    if prompt is not None:
        return prompt
    if name is None and task is not None:
        name = first_prompt(prompts, task)
    return named_prompt(prompts, default if name is None else name)


def filled(
    spec: ModelSettings, call: str, inputs: Sequence[Any], options: Mapping[str, Any]
) -> tuple[str, list[Any], dict[str, Any]]:
    """Fill in what the alias has and the call does not say. Returns the call's name, its inputs and its options.

    A call's prompt counts instead of the alias's, and its task instead of the alias's task and prompt. `is_told`, for
    the kinds that take prepared texts, tells whether the call itself says what stands before its texts.
    """
    chosen = dict(options)
    is_built_in = ":" not in spec.kind  # a user's own kind has its own arguments
    if is_built_in and len(inputs) > 1 + len(BY_PLACE):
        raise TypeError(f"{call}() takes {' and '.join(BY_PLACE)} by their places: give other options by their names")
    if is_built_in and len(inputs) > 1:
        chosen |= dict(zip(BY_PLACE, inputs[1:], strict=False))
        inputs = inputs[:1]
    says_task = call in CALLS.values() or chosen.get("task") is not None
    is_told = says_task or any(chosen.get(name) is not None for name in BY_PLACE)
    if spec.kind in DENSE_KINDS:
        chosen["is_told"] = is_told
    if not is_told:
        chosen |= _given({name: getattr(spec, name) for name in BY_PLACE})
    if not says_task and spec.task is not None:
        call = CALLS[spec.task]
    for setting, option in STAND_INS.items():
        if chosen.get(option) is None and getattr(spec, setting) is not None:
            chosen[option] = getattr(spec, setting)
    return call, list(inputs), chosen


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
