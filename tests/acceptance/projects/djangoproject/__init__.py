"""A Django project with an app of the same name, as Celery's documentation has it, and one line of legit_worker.

In: `DJANGO_SETTINGS_MODULE=djangoproject.settings`. Out: tasks that write rows before and after they call a model.
"""

from djangoproject.celery import app

__all__ = ["app"]
