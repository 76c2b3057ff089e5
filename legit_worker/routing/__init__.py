"""Routes each app's results to its own queue. `result_backend = "legit_worker.routing:RoutingBackend+redis://…"`."""

from legit_worker.routing.backend import RoutingBackend

__all__ = ["RoutingBackend"]
