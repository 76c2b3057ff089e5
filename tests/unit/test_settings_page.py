"""docs/settings.md says what the code says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "lib"))

from settings_page import BEGIN, END, MORE, NOTHING, PAGE, TABLES, current, default, meanings

from legit_worker import settings
from legit_worker.pool.intake import DEFAULT_WINDOW
from legit_worker.pool.share import MAX_HELD_SECONDS
from legit_worker.settings.schema import GROUPS, Settings


def rows() -> dict[str, tuple[str, str]]:
    """By variable, the default and the meaning that the page shows."""
    generated = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    found = re.findall(r"^\| `([A-Z_<>]+)` \| (?:`(.*?)`)? ?\| (.*) \|$", generated, re.MULTILINE)
    return {variable: (shown, meaning) for variable, shown, meaning in found}


def test_the_page_is_current() -> None:
    page = PAGE.read_text()
    assert current(page) == page, "run .venv/bin/python scripts/lib/settings_page.py"


@pytest.mark.parametrize(("owner", "before"), [table[1:] for table in TABLES], ids=[table[0] for table in TABLES])
def test_each_setting_is_on_the_page_with_its_default_and_its_meaning(owner: type[BaseModel], before: str) -> None:
    shown = rows()
    for name, field in owner.model_fields.items():
        if owner is Settings and name in (*GROUPS, "tasks"):
            continue
        said, meaning = shown[before + name.upper()]
        assert said == default(name, field)
        assert len(meaning) > 10, f"{name} has no #: line"


def test_a_default_on_the_page_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies it into the environment changes nothing."""
    before = settings.load({"LEGIT_WORKER_ENABLED": "1"})
    written = {
        f"LEGIT_WORKER_{variable}": shown
        for variable, (shown, _) in rows().items()
        if shown and "<" not in variable and variable not in ("WINDOW", "MAX_HELD_SECONDS", "ENABLED")
    }
    assert settings.load({"LEGIT_WORKER_ENABLED": "1"} | written) == before


def test_the_measured_defaults_are_the_pools() -> None:
    assert NOTHING["window"] == f"{DEFAULT_WINDOW}"
    assert NOTHING["max_held_seconds"] == f"{MAX_HELD_SECONDS:g}"


def test_no_meaning_speaks_python() -> None:
    assert [name for _, owner, _ in TABLES for name, said in meanings(owner).items() if "None" in said] == []


def test_what_more_is_said_about_is_a_setting() -> None:
    names = {name for _, owner, before in TABLES for field in owner.model_fields for name in (field, before + field)}
    assert set(MORE) <= names


def test_a_setting_with_few_values_has_all_of_them_on_the_page() -> None:
    """Also those that its meaning explains: a list without them would look as if they were refused."""
    shown = rows()
    assert "One of `auto`, `float32`, `tf32`, `float16`, `bfloat16`, `int8`." in shown["MODELS__<ALIAS>__DTYPE"][1]
    assert "One of `torch`, `openvino`, `onnx`, `auto`." in shown["MODELS__<ALIAS>__BACKEND"][1]
