"""The models: what one is, which there are, how a task calls one, and the built-in kinds."""
