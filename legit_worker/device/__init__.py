"""The device: a CPU, a GPU or a simulated one, and the state of torch that belongs to a thread."""
