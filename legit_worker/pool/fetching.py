"""At each turn of the hub: look for more tasks first, or compute?

In: the hub, and what waits. Out: whether to compute a batch now.
"""

from __future__ import annotations

import functools
from typing import Any

from legit_worker.broker.owners import is_more_coming
from legit_worker.pool.engine import Engine
from legit_worker.pool.intake import Intake
from legit_worker.pool.pace import Pace
from legit_worker.pool.wakeup import listen


class Fetching:
    """One pool's. Lives on the main thread."""

    def __init__(self, engine: Engine, intake: Intake, pace: Pace) -> None:
        self._engine = engine
        self._intake = intake
        self._pace = pace
        self._gave_way = False
        #: The hub, once there is one.
        self.hub: Any = None

    def is_over(self) -> bool:
        """Whether fetching is, for now, and a batch is computed."""
        # The hub calls those that can be read in the order in which they could: without this, an operator's command
        # that came during a batch would wait for the next one, too. Once in a row, so that no flood stops the batches.
        self._gave_way = not self._gave_way and listen(self.hub.poller.poll, 0)
        if self._gave_way:
            return False
        if self._engine.is_ready or self._intake.is_full or self._engine.is_urgent:
            return True
        return self._pace.should_compute(
            waiting_seconds=self._engine.waiting_seconds(),
            surplus_seconds=self._engine.surplus_seconds(),
            launch_seconds=self._engine.launch_seconds(),
            full=self._engine.has_full_batch,
            coming=is_more_coming(),
            look=functools.partial(listen, self.hub.poller.poll),
        )
