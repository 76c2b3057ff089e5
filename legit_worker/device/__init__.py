"""The device: which one, and what of torch's state belongs to a thread rather than to a task."""
