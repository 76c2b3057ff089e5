"""These need a GPU. Elsewhere they are skipped; where `LEGIT_TEST_GPU=1` says that there is one, that is a failure."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """The machine's first."""
    if torch.cuda.is_available():
        return
    if os.environ.get("LEGIT_TEST_GPU"):
        pytest.fail("torch sees no GPU", pytrace=False)
    pytest.skip("torch sees no GPU")
