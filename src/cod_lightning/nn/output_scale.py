"""A constant factor on the output of a module.

The module gets a Python float, `cod_output_scale`, and a forward hook that multiplies its output by it. So parameter
names do not change, and the factor survives meta initialisation, `.to(bfloat16)`, compilation, sharding, copies and
pickling.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cod_lightning.nn.layouts import hidden_output, with_hidden


def scale_output(module: Any, factor: float) -> None:
    """Multiply the output of a module by a factor from now on."""
    module.cod_output_scale = factor
    module.register_forward_hook(multiply_output)


def is_scaled(module: nn.Module) -> bool:
    """Whether `scale_output` was called."""
    return multiply_output in module._forward_hooks.values()


class MultiplyOutput:
    """Forward hook: the output, or the first of a tuple of outputs, times the module's `cod_output_scale`."""

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return with_hidden(output, hidden_output(output) * module.cod_output_scale)

    def __reduce__(self) -> Any:
        return unpickled_hook, ()  # also in another process, where nothing was scaled


multiply_output = MultiplyOutput()


def unpickled_hook() -> MultiplyOutput:
    """`multiply_output`, which `torch.compile` sees from now on."""
    forget_compiled()
    return multiply_output


def remove_scale(module: Any) -> None:
    """Undo `scale_output`."""
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is multiply_output]:
        del hooks[key]
    del module.cod_output_scale


def forget_compiled() -> None:
    """Let `torch.compile` see the hooks: by default it runs code of the same class that was compiled without them."""
    import torch._dynamo  # takes a second, which models of transformers have spent

    settings: Any = torch._dynamo.config
    if settings.skip_nnmodule_hook_guards:
        settings.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
