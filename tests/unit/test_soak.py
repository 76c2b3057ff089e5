"""What `scripts/soak` takes for growth."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "lib"))
soak: Any = importlib.import_module("soak")


def samples(name: str, *values: float) -> list[Any]:
    return [soak.Sample(float(number), {name: value}, 0) for number, value in enumerate(values)]


@pytest.mark.parametrize("name", soak.BOUNDS)
def test_what_grows_in_the_last_third_by_more_than_its_bound_is_told(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = soak.BOUNDS[name]
    before = [0.0] * 3 + [100.0] * 3
    assert soak.told(name, samples(name, *before, *[100.0 + bound] * 3)), "the first third is a start"
    assert not soak.told(name, samples(name, *before, *[101.0 + bound] * 3))
    assert capsys.readouterr().out.splitlines()[1].endswith("GROWS")


def test_a_swing_is_no_growth() -> None:
    swing = [700.0, 800.0] * 12
    assert soak.told("MiB without weights", samples("MiB without weights", *swing))
