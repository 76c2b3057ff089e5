"""What computes a model's batches in place of torch: OpenVINO, on a CPU.

In: a loaded model of a built-in kind. Out: its graphs, converted once and kept in a folder; or the reason for none.
"""
