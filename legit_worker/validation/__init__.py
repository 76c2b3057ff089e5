"""`celery legit validate`: whether a worker's vectors are those of `SentenceTransformer.encode`, by every format."""
