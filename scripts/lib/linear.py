"""Times a transformer's linear layers on this CPU: `python scripts/lib/linear.py [--threads N]`.

In: nothing. Out: microseconds for one layer by torch's own choice, by oneDNN with torch's layout of the weights, and by
oneDNN with its own, for a layer of MiniLM and of BERT. See `legit_worker/device/linear.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Features in and out: a projection and the two layers between, of MiniLM and of BERT base.
SHAPES = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768))
#: Tokens of a batch.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: Layers in a row, so that no weights stay in the caches; and runs, of which the fastest counts.
LAYERS, RUNS = 12, 5
#: Rows for which oneDNN chooses its layout.
PACKED_FOR = 256


def main() -> None:
    """Print a line for each shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    own = torch.Generator().manual_seed(0)
    print(f"{torch.get_num_threads()} threads, us for one layer: torch, oneDNN, oneDNN packed, and torch / packed")
    with torch.inference_mode():
        for features, outputs in SHAPES:
            weights = [torch.randn(outputs, features, generator=own) for _ in range(LAYERS)]
            biases = [torch.randn(outputs, generator=own) for _ in range(LAYERS)]
            packed = [torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR) for weight in weights]
            for rows in ROWS:
                x = torch.randn(rows, features, generator=own)
                times = [_microseconds(linear, x, weights, biases)]
                times += [_microseconds(_by_onednn, x, these, biases) for these in (weights, packed)]
                told = " ".join(f"{one:7.0f}" for one in times)
                print(f"{features:5} to {outputs:5}, {rows:4} rows: {told}  {times[0] / times[-1]:5.2f}", flush=True)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _microseconds(product: Product, x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> float:
    times = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        for weight, bias in zip(weights, biases, strict=True):
            product(x, weight, bias)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / LAYERS


if __name__ == "__main__":
    main()
