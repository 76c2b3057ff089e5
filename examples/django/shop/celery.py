"""The Celery app, as Celery's documentation for Django has it. One line is legit_worker's."""

import os

from celery import Celery

import legit_worker

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
legit_worker.install(app)
