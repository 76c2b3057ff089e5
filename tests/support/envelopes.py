"""Whether an envelope is what `docs/envelope.schema.json` promises, and how to read it.

In: an envelope as its consumer got it. Out: the same as a dict, or an error that says which field is wrong.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "envelope.schema.json").read_text())

_validator = Draft202012Validator(SCHEMA)


def check(envelope: str | bytes | dict[str, Any]) -> dict[str, Any]:
    """The envelope as a dict. Raises `jsonschema.ValidationError`; also where an array's bytes don't fill its shape."""
    opened: dict[str, Any] = json.loads(envelope) if isinstance(envelope, str | bytes) else envelope
    _validator.validate(opened)
    floats(opened["result"])
    return opened


def floats(result: Any) -> Any:
    """A result with every array of `ENCODING=base64` as nested lists, and all else as it is."""
    if isinstance(result, list):
        return [floats(part) for part in result]
    if not isinstance(result, dict):
        return result
    if not {"base64", "dtype", "shape"} <= result.keys():  # a task's own result may have a key `base64`
        return {name: floats(part) for name, part in result.items()}
    _validator.evolve(schema={"$ref": "#/$defs/array", "$defs": SCHEMA["$defs"]}).validate(result)
    return np.frombuffer(base64.b64decode(result["base64"]), result["dtype"]).reshape(result["shape"]).tolist()
