"""The check of every envelope that a test sees, against the schema in `docs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "envelope.schema.json").read_text())

_VALIDATOR = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)


def check(envelope: Any) -> None:
    """Raises `jsonschema.ValidationError` where an envelope is not as the schema says."""
    _VALIDATOR.validate(envelope)
