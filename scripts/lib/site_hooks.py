"""What the site has beside docs/: the examples. MkDocs calls these functions.

In: examples/. Out: the same files below `examples/` in the site, and links that lead there. In the repository docs/ and
examples/ stand side by side; in the site the one is inside the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add each file of examples/."""
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Change the links between the two folders."""
    if page.file.src_uri.startswith("examples/"):
        return markdown.replace("](../../docs/", "](../../")
    return markdown.replace("](../examples/", "](examples/")
