"""An input costs what the model computes for it: tokens of a text, patches of an image, and both of a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models

from legit_worker.models.handle import use
from legit_worker.testing import use_models

#: Patches of an image in the tiny models' size.
PATCHES = (tiny_models.IMAGE_SIZE // tiny_models.PATCH_SIZE) ** 2


def cost(path: Path, item: Any) -> int:
    """Of one input to a model of kind `image`."""
    models = {"m": {"kind": "image", "path": str(path)}}
    with use_models(models) as registry, use(registry.get("m"), registry.residency) as model:
        found: int = model.cost(model.preprocess(item))
        return found


@pytest.mark.parametrize(("width", "height"), [(40, 48), (400, 300), (8, 8)])
def test_an_image_costs_its_patches_whatever_its_size_was(tiny_paths: dict[str, Path], width: int, height: int) -> None:
    assert cost(tiny_paths["image"], tiny_models.picture(1, width, height)) == PATCHES


def test_a_text_costs_its_tokens_beside_images(tiny_paths: dict[str, Path]) -> None:
    assert cost(tiny_paths["image"], "red") == len("red") + 2


def test_a_pair_costs_its_tokens_and_its_patches(tmp_path: Path) -> None:
    path = tiny_models.build_text_and_image(tmp_path)
    picture = tiny_models.picture(1, 64, 64)
    assert cost(path, {"text": "red apple", "image": picture}) == len(["[CLS]", "red", "apple", "[SEP]"]) + PATCHES
