"""What a Dockerfile says, as far as a test can do it without Docker.

In: the file's text. Out: for each target, the files that are copied, the environment, the user and the commands.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Image:
    """What one target makes."""

    copied: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    #: What `pip install` is given.
    installed: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()
    user: str = "root"


def images(text: str) -> dict[str, Image]:
    """Each target of a Dockerfile, by its name."""
    found: dict[str, Image] = {}
    target = ""
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            origin, _, target = rest.partition(" AS ")
            found[target] = found.get(origin, Image())
        elif target:
            found[target] = _after(found[target], word, rest.strip())
    return found


def _after(image: Image, word: str, rest: str) -> Image:
    if word == "COPY":
        return replace(image, copied=(*image.copied, *rest.split()[:-1]))
    if word == "ENV":
        return replace(image, environment=image.environment | dict(pair.split("=", 1) for pair in rest.split()))
    if word == "RUN":
        return replace(image, installed=(*image.installed, *re.findall(r'"(\.\[.*?\])"', rest)))
    if word == "CMD":
        return replace(image, command=tuple(json.loads(rest)))
    if word == "HEALTHCHECK":
        return replace(image, healthcheck=tuple(json.loads(rest.partition("CMD ")[2])))
    return replace(image, user=rest) if word == "USER" else image
