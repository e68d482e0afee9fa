"""Functions of tensors: norms and loss in plain torch, which is the specification, and faster kernels."""
