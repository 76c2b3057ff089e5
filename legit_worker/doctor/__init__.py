"""`celery legit doctor`: what of this machine and this project's settings will work, and what to do about the rest."""
