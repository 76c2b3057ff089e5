"""`celery legit doctor`: checks what works on this machine and in this project, and says what to do about the rest."""
