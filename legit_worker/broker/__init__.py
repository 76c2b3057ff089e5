"""How a worker takes tasks from a Redis broker: many in one step, and none lost between the queue and the worker."""
