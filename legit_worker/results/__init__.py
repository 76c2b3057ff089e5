"""Results on a Redis result backend, stored for many tasks at once.

Imports are explicit: `writes`, `writer`, `backend`.
"""
