"""A user's own model, whose module takes its time to be imported."""

from __future__ import annotations

import time

from custom_models import Upper

time.sleep(3)


class Model(Upper):
    """Nothing of its own."""
