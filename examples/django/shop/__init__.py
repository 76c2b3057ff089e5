"""A Django project and app: products that are found by their meaning. Importing it makes the Celery app, too."""

from shop.celery import app

__all__ = ["app"]
