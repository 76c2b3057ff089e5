"""How a worker takes tasks from its broker.

On Redis it takes many in one step, and loses none between the queue and itself. From any broker, a message that can't
become a task does not end it.
"""
