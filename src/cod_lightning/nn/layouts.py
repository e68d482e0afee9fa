"""Where a model from elsewhere keeps its blocks, the norms before their sub-layers, and the sub-layers' projections.

Known are the causal language models of `transformers` whose blocks are laid out like those of Llama, Gemma 2 or GPT-2.
Any other Pre-LN model is described by a `Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from cod_lightning.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Module paths of a Pre-LN model; each pair is for attention and for the feed-forward network.

    Example: `Layout("transformer.blocks", norms=("ln_1", "ln_2"), sublayers=("attn", "ffn"))`.
    """

    blocks: str
    """The list of blocks, from the model."""
    norms: tuple[str, str]
    """The norms before the sub-layers, from a block."""
    sublayers: tuple[str, str]
    """The sub-layers, from a block: each gets the output of its norm."""
    branches: tuple[str, str] | None = None
    """The modules whose outputs are added to the residual stream; None: the sub-layers."""
    inputs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """The linear layers that read the output of a norm; needed to keep a trained model's function."""
    outputs: tuple[str, str] | None = None
    """The last linear layers of the sub-layers; needed for strategies that scale branches or their initialisation."""


LLAMA = Layout(
    "model.layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    sublayers=("self_attn", "mlp"),
    inputs=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    outputs=("self_attn.o_proj", "mlp.down_proj"),
)
GEMMA = Layout(
    "model.layers",
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    sublayers=("self_attn", "mlp"),
    branches=("post_attention_layernorm", "post_feedforward_layernorm"),
    inputs=LLAMA.inputs,
    outputs=LLAMA.outputs,
)
GPT2 = Layout(
    "transformer.h",
    norms=("ln_1", "ln_2"),
    sublayers=("attn", "mlp"),
    inputs=(("attn.c_attn",), ("mlp.c_fc",)),
    outputs=("attn.c_proj", "mlp.c_proj"),
)


@dataclass(frozen=True)
class Site:
    """A sub-layer of a block and the modules around it."""

    layer: int
    """Counts from 1."""
    part: str
    """"attention" or "ffn"."""
    block: Any
    norm: Any
    """Before the sub-layer."""
    sublayer: Any
    branch: Any
    """Its output is added to the residual stream."""
    inputs: list[Any]
    """The linear layers behind the norm; empty if the layout does not name them."""
    output: Any
    """The last linear layer; None if the layout does not name it."""


def sites(model: nn.Module, layout: Layout | None = None) -> list[Site]:
    """The two sub-layers of every block, first to last.

    Args:
        model: any module.
        layout: where it keeps its blocks; None: by the names of its modules.

    Raises:
        UserError: the model has no module that the layout names, no norms before its sub-layers, or no known layout.
    """
    layout = layout or find_layout(model)
    blocks: Any = submodule(model, layout.blocks, type(model).__name__)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(f"layout.blocks={layout.blocks!r} is a {type(blocks).__name__}; expected an nn.ModuleList")
    result = []
    for layer, block in enumerate(blocks, start=1):
        for index, part in enumerate(("attention", "ffn")):
            name = f"{layout.blocks}.{layer - 1}"
            norm, sublayer = (submodule(block, paths[index], name) for paths in (layout.norms, layout.sublayers))
            branch = submodule(block, layout.branches[index], name) if layout.branches else sublayer
            inputs = [submodule(block, path, name) for path in layout.inputs[index]]
            output = submodule(block, layout.outputs[index], name) if layout.outputs else None
            result.append(Site(layer, part, block, norm, sublayer, branch, inputs, output))
    return result


def find_layout(model: nn.Module) -> Layout:
    """The layout of a causal language model of `transformers`, by the names of its modules.

    Raises:
        UserError: the model has no norms before its sub-layers, or is laid out in another way.
    """
    for layout in (GEMMA, LLAMA, GPT2):
        try:
            sites(model, layout)
        except UserError:
            continue
        return layout
    name = type(model).__name__
    if any(path.endswith("layers.0.post_feedforward_layernorm") for path, _ in model.named_modules()):
        raise UserError(f"{name} has no norms before its sub-layers (OLMo 2 and 3 norm their outputs)")
    raise UserError(
        f"{name} has an unknown layout; name its modules: "
        "layout=Layout(blocks='path.to.the.list', norms=('ln_1', 'ln_2'), sublayers=('attn', 'mlp'))"
    )


def submodule(module: nn.Module, path: str, name: str) -> Any:
    """`module.get_submodule(path)`.

    Raises:
        UserError: there is none; the message names the module and the path.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise UserError(f"{name} has no module {path!r}") from None
