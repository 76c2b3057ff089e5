"""Prepares input on the CPU before a model gets it: reads texts and images, and keeps clear of CUDA."""
