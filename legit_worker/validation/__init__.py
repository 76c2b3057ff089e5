"""`celery legit validate`: compares a worker's answers, by every result format, with the library's own."""
