"""Real English texts that every machine with Python has: the standard library's own docstrings.

In: the standard library's source files, parsed but never imported. Out: `Text`s (a name and its docstring's first
paragraph), and from their words short titles and mixed texts of chosen lengths. Everything is seeded: the same Python
gives the same texts.
"""

from __future__ import annotations

import ast
import math
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Folders of the standard library that hold tests, vendored code and other people's packages, not documentation.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "_vendor"})
#: Characters: below this a docstring is a label ("Internal."), not a sentence.
SHORTEST = 30
#: Words: the same bound, for long names in short sentences.
FEWEST_WORDS = 5
#: Seed of every random choice here, so that two runs on one machine see the same texts.
SEED = 20

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Text:
    """One docstring."""

    #: What it documents, such as `random.Random.choice`.
    name: str
    #: Its first paragraph, on one line.
    content: str


def docstrings(limit: int | None = None) -> list[Text]:
    """At most `limit` distinct docstrings, in an order that mixes all modules and is the same every time."""
    distinct = {text.content: text for text in _all_docstrings()}
    texts = sorted(distinct.values(), key=lambda text: (text.name, text.content))
    random.Random(SEED).shuffle(texts)
    return texts[:limit]


def short_titles(count: int) -> list[str]:
    """`count` titles of 2 to 5 words that follow each other in a docstring."""
    words, choose = _words(), random.Random(SEED)
    return [_run_of_words(words, choose, choose.randint(2, 5)) for _ in range(count)]


def mixed_texts(
    count: int, tokens_in: Callable[[str], int], *, mean: float = 85, longest: int = 256, spread: float = 0.6
) -> list[str]:
    """`count` texts whose lengths in tokens are lognormal with the given mean, cut at `longest`.

    `tokens_in` counts a word's tokens; `spread` is the lognormal's sigma. Two tokens of each text are the model's own
    start and end.
    """
    choose = random.Random(SEED)
    words = _words()
    costs = {word: tokens_in(word) for word in set(words)}
    centre = math.log(mean) - spread**2 / 2
    lengths = [min(longest, round(choose.lognormvariate(centre, spread))) - 2 for _ in range(count)]
    return [_run_of_tokens(words, costs, choose, length) for length in lengths]


def _run_of_words(words: list[str], choose: random.Random, count: int) -> str:
    start = choose.randrange(len(words) - count)
    return " ".join(words[start : start + count])


def _run_of_tokens(words: list[str], costs: dict[str, int], choose: random.Random, tokens: int) -> str:
    """As many words as fit in `tokens` (at least one), from a random place on."""
    start = choose.randrange(len(words))
    chosen = [words[start]]
    spent = costs[words[start]]
    for offset in range(1, tokens):
        word = words[(start + offset) % len(words)]
        spent += costs[word]
        if spent > tokens:
            break
        chosen.append(word)
    return " ".join(chosen)


def _words() -> list[str]:
    """The words of all docstrings, in order; what has no letter (rulers, signatures) is left out."""
    return [word for text in docstrings() for word in text.content.split() if any(map(str.isalpha, word))]


def _all_docstrings() -> Iterator[Text]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts):
            yield from _docstrings_of(path, _module_name(relative))


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings_of(path: Path, module: str) -> Iterator[Text]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # some files of the standard library are templates, or deliberately broken
        return
    yield from _walk(tree, module)


def _walk(node: Documented, name: str) -> Iterator[Text]:
    """The node's docstring, then those of the public classes and functions in its body."""
    content = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    if len(content) >= SHORTEST and len(content.split()) >= FEWEST_WORDS:
        yield Text(name=name, content=content)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _walk(child, f"{name}.{child.name}")
