"""How hypothesis runs: without a deadline, since no test asserts a speed, and a busy machine has none to offer."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("without a deadline", deadline=None)
settings.load_profile("without a deadline")
