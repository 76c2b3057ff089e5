"""How a worker takes tasks from its broker.

On Redis, a worker takes many messages in one step, and a kill loses none on its way. With any broker, a message that
can't become a task does not end the worker.
"""
