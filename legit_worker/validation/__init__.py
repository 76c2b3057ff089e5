"""`celery legit validate`: compares a worker's vectors, by every result format, with `SentenceTransformer.encode`."""
