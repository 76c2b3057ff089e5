"""The bar that `celery legit status` draws of a device's memory."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from legit_worker.cli.status import BAR, _memory

MIB = 2**20


def pool(models: dict[str, int], **memory: int | None) -> dict[str, Any]:
    """What a worker tells, sizes in MiB."""
    sizes = {"budget": 100, "weights": sum(models.values()), "reserve": 0, "host_cache": 0, "waiting": 0} | memory
    return {
        "models": {alias: {"state": "resident", "weights": size * MIB} for alias, size in models.items()},
        "memory": {name: size if name == "waiting" or size is None else size * MIB for name, size in sizes.items()},
    }


def test_it_shows_others_each_model_reserve_headroom_and_what_is_free() -> None:
    told = pool({"minilm": 100, "clip": 200}, total=1000, others=200, headroom=100, free=500, reserve=150, budget=700)
    bar, legend = _memory(told).plain.splitlines()
    assert bar == "▒" * 8 + "█" * 12 + "▓" * 6 + "·" * 4 + "░" * 10
    assert legend == (
        "▒ others 200 MiB, █ minilm 100 MiB, █ clip 200 MiB, ▓ reserve for batches 150 MiB, · headroom 100 MiB, "
        "░ free 250 MiB; this worker may take 700 MiB"
    )


def test_without_nvml_it_is_a_bar_of_the_limit() -> None:
    bar, legend = _memory(pool({"minilm": 25}, waiting=3)).plain.splitlines()
    assert bar == "█" * 10 + "░" * 30
    assert legend.endswith("this worker may take 100 MiB; 3 tasks wait for room")


def test_without_a_limit_it_is_a_sentence() -> None:
    assert _memory(pool({"minilm": 25}, budget=None)).plain == "weights: 25 MiB, no limit"


@given(st.lists(st.integers(0, 50), min_size=6, max_size=6))
def test_whatever_the_sizes_the_bar_has_one_length(sizes: list[int]) -> None:
    first, second, others, headroom, free, reserve = sizes
    told = pool({"a": first, "b": second}, others=others, headroom=headroom, free=free, reserve=reserve)
    lines = _memory(told).plain.splitlines()
    assert len(lines[0]) == BAR or not any((first, second, others, free))
