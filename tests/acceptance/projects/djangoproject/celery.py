"""The Celery app, as Celery's documentation for Django has it.

In: Django's settings. Out: an app that finds the tasks of all installed apps.
"""

from celery import Celery

import legit_worker

app = legit_worker.install(Celery("djangoproject"))
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
