"""A model whose transformer is an ONNX file, as sentence-transformers' `backend="onnx"` has it: `onnx/model.onnx`.

In: the model's folder and its library's object. Out: one graph, of the file and of the modules behind the transformer.
OpenVINO computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from legit_worker.backends.graphs import Features, convert, core, first_line, library, tensors_of
from legit_worker.errors import BackendError

#: The places of the file in a model's folder, as Optimum writes it.
PLACES = ("onnx/model.onnx", "model.onnx")

#: The file's outputs that are the transformer's, as Optimum names them: hidden states, and the scores of a head.
OUTPUTS = ("token_embeddings", "last_hidden_state", "logits")


def find(folder: Path | None) -> Path:
    """Return the ONNX file of a model's folder. Raises `BackendError`."""
    if folder is None:
        raise BackendError("its files are not on this machine")
    for place in PLACES:
        if (folder / place).is_file():
            return folder / place
    others = ", ".join(str(file.relative_to(folder)) for file in sorted(folder.rglob("*.onnx")))
    raise BackendError(
        f"{folder} has no {PLACES[0]}" + (f", but {others}" if others else "") + ": export it by Optimum"
    )


def read(file: Path, modules: Sequence[Any], finish: Any, example: Features) -> Any:
    """Return the graph of the file and of the modules behind the first one. Raises `BackendError`.

    `finish`: from the last module's features to rows. `example` as for `convert`.
    """
    try:
        head = core().read_model(file)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO can't read {file}: {first_line(error)}") from error
    names = {name for port in head.inputs for name in port.get_names()}
    if missing := names - tensors_of(example).keys():
        raise BackendError(f"{file} reads {', '.join(sorted(missing))}, which the model's tokenizer does not give")
    output = next((name for name in OUTPUTS if any(name in port.get_names() for port in head.outputs)), None)
    if output is None:
        raise BackendError(f"{file} has none of the outputs {', '.join(OUTPUTS)}")
    first, *rest = modules
    tail = _Tail(rest, finish)
    with torch.no_grad():
        between = first(dict(example))
    states = {name: between[name] for name in (first.module_output_name, "attention_mask") if name in between}
    return _joined(head, output, convert(tail, tail, states), first.module_output_name)


class _Tail(torch.nn.Module):
    """The modules behind the transformer."""

    def __init__(self, modules: Sequence[torch.nn.Module], finish: Any) -> None:
        super().__init__()
        self.behind = torch.nn.ModuleList(modules)
        self._finish = finish

    def forward(self, features: Mapping[str, Any]) -> Any:
        found = dict(features)
        for module in self.behind:
            found = module(found)
        return self._finish(found)


def _joined(head: Any, output: str, tail: Any, between: str) -> Any:
    """One graph: the tail reads the head's output, and the head's inputs."""
    for port in tail.inputs:
        name = port.get_any_name()
        source = head.output(output).get_node().input_value(0) if name == between else head.input(name)
        for target in port.get_target_inputs():
            target.replace_source_output(source.get_node().output(source.get_index()))
    return library().Model(tail.get_results(), head.get_parameters(), "joined")
