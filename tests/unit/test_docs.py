"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: `file::test`, as docs/compatibility.md writes it.
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "compatibility.md").read_text())))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda part: part)
def test_each_line_of_the_compatibility_table_has_its_test(file: str, test: str) -> None:
    assert f"\ndef {test}(" in (ROOT / "tests" / "acceptance" / file).read_text()


def test_the_table_names_tests_in_every_line() -> None:
    lines = (ROOT / "docs" / "compatibility.md").read_text().splitlines()
    rows = lines[lines.index("## Task life") :]
    cells = [row for row in rows if row.startswith("|") and not row.startswith(("|---", "| feature |"))]
    assert cells
    assert all("::test_" in row for row in cells)


def test_the_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = "batching|broker|device|metrics|models|pool|prep|results|routing|settings"
    named = set(re.findall(rf"\b(?:{rooms})/\w+\.py", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / "legit_worker" / name).is_file()] == []
