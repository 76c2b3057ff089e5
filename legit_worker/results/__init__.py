"""Results on a Redis result backend, stored for many tasks at once.

Imports are explicit: `conditional`, `writes`, `writer`, `backend`.
"""
