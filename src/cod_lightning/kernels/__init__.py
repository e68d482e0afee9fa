"""Tensors only: the norms as plain torch, the specification that faster kernels are held to."""
