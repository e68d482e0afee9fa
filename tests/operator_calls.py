"""The operators that a computation calls."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """Counts the calls of every operator, and keeps the number of elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.calls[str(operator)] += 1
        outputs = out if isinstance(out, tuple) else (out,)
        self.largest = max([self.largest, *(t.numel() for t in outputs if isinstance(t, torch.Tensor))])
        return out
