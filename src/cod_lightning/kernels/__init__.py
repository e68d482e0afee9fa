"""Tensors only: norms and loss as plain torch, the specification, and the faster kernels that are held to it."""
