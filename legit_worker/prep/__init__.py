"""CPU work before a model: where inputs come from, and what keeps it clear of CUDA."""
