"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from legit_worker import errors, settings
from legit_worker.cli import legit

ROOT = Path(__file__).parents[2]

#: `file::test`, as docs/compatibility.md writes it.
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "compatibility.md").read_text())))

#: All that readers open.
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])

#: What users start workers with.
DEPLOYED = sorted(
    path for path in [*(ROOT / "deploy").rglob("*"), *(ROOT / "examples").rglob("*.env")] if path.is_file()
)

#: What the documents name as no setting: the file of settings, a misspelt one, and what Kubernetes sets by itself.
NO_SETTINGS = {"LEGIT_WORKER_CONFIG", "LEGIT_WORKER_ENABLE", "LEGIT_WORKER_SERVICE_HOST"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert [link for link in links(page.read_text()) if not is_there(page, link)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_table_has_a_head(page: Path) -> None:
    """Rows without one are shown as they are written."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE)
    assert [table for table in tables if not re.match(r"\|.*\n\|(?:-+\|)+\n", table)] == []


@pytest.mark.parametrize("page", [*PAGES, *DEPLOYED], ids=lambda page: str(page.relative_to(ROOT)))
def test_each_variable_that_is_named_is_a_setting(page: Path) -> None:
    """Names with a placeholder, as `LEGIT_WORKER_APPS__<APP>__…`, are left out."""
    named = set(re.findall(r"\bLEGIT_WORKER_[A-Z0-9_]*[A-Z0-9](?![\w<…*])", page.read_text()))
    assert settings.unknown(dict.fromkeys(named - NO_SETTINGS, "1")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_of_ours_that_is_typed_is_there(page: Path) -> None:
    consoles = re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    typed = re.findall(
        r"^\$ .*celery .* legit (\w+)(?: (list|show|replay|drop|load|unload|pin|unpin)\b)?",
        "".join(consoles),
        re.MULTILINE,
    )
    for command, inner in typed:
        found = legit.get_command(click.Context(legit), command)
        assert found is not None
        assert not inner or inner in getattr(found, "commands", {})
    for script in re.findall(r"^\$ (scripts/\w+)", "".join(consoles), re.MULTILINE):
        assert (ROOT / script).is_file()


def links(text: str) -> list[str]:
    """The links to other pages, and to headings of this one."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]


def is_there(page: Path, link: str) -> bool:
    """Whether the file of a link is there, and its heading."""
    name, _, heading = link.partition("#")
    file = page.parent / name if name else page
    return file.exists() and (not heading or heading in headings(file.read_text()))


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    written = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in written}


def test_each_page_is_in_the_sites_navigation_and_can_be_reached_from_the_first_page() -> None:
    def listed(part: Any) -> set[str]:
        if isinstance(part, str):
            return {part}
        return {name for inner in (part.values() if isinstance(part, dict) else part) for name in listed(inner)}

    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    examples = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.md")}
    navigation = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert navigation == pages | examples
    linked = {link.partition("#")[0] for link in links((ROOT / "docs" / "index.md").read_text())}
    assert pages - linked == {"index.md"}
    listed_examples = {link.removeprefix("../") for link in links((ROOT / "docs" / "examples.md").read_text())}
    assert examples == listed_examples


def test_the_table_of_errors_has_each_and_says_whether_it_is_retryable() -> None:
    """Two are turned into others before a task sees them. A result that can't be sent is the same at the next try."""
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \|$", (ROOT / "docs" / "tasks.md").read_text(), re.MULTILINE)
    own = {name: found for name, found in vars(errors).items() if name.endswith("Error") and name != "LegitWorkerError"}
    assert {name for name, _ in rows} == own.keys() - {"LimitError", "BackendError"}
    assert {name for name, said in rows if said == "yes"} == {
        name for name, found in own.items() if found.retryable and name != "RoutingError"
    }


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
