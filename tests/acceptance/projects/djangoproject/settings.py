"""Django's settings, Celery's among them.

In: Celery's environment variables, `PROJECT_QUEUE`, and `PROJECT_DATABASES`: a folder. Out: two SQLite databases there.
"""

import os
from pathlib import Path

_folder = Path(os.environ["PROJECT_DATABASES"])

SECRET_KEY = "no secret"
USE_TZ = True
INSTALLED_APPS = ["djangoproject"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    name: {"ENGINE": "django.db.backends.sqlite3", "NAME": str(_folder / f"{name}.sqlite3")}
    for name in ("default", "other")
}

CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]
CELERY_RESULT_BACKEND = os.environ["CELERY_RESULT_BACKEND"]
CELERY_TASK_DEFAULT_QUEUE = CELERY_CONTROL_EXCHANGE = os.environ["PROJECT_QUEUE"]
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
