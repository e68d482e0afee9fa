"""Module paths of stock models: blocks, the norms before their sub-layers, and the sub-layers' projections.

`LAYOUTS` are those of causal language models of `transformers`. Any other Pre-LN model is described by a `Layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.nn.norms import IdentityNorm
from cod_lightning.nn.weights import refuse_fsdp1


@dataclass(frozen=True)
class Layout:
    """Module paths of a model; each pair is for attention and for the feed-forward network.

    `fold`, `param_groups` and `apply` of a trained model read and multiply parameters that are called `weight` and
    `bias`, no others.

    Example: `Layout("transformer.blocks", norms=("ln_1", "ln_2"), sublayers=("attn", "ffn"))`.
    """

    blocks: str
    """All blocks, first to last, from the model: an `nn.ModuleList`, `nn.Sequential` or `nn.ModuleDict`."""
    norms: tuple[str, str] | None
    """The norms before the sub-layers, from a block; None: the sub-layers have none of their own, so the model takes no
    strategy."""
    sublayers: tuple[str, str]
    """The sub-layers, from a block: each gets the output of its norm."""
    branches: tuple[str, str] | None = None
    """The modules whose outputs are added to the residual stream; None, or an `nn.Identity`: the sub-layers. If a
    sub-layer adds the stream itself, as BLOOM's do, its linear layer before the addition."""
    inputs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """The linear layers that read the output of a norm; needed for trained="preserve", for strategies that scale their
    initial weights, and for `param_groups(form="matrices")`."""
    outputs: tuple[str, str] | None = None
    """The last linear layers of the sub-layers; needed for strategies that scale their initial weights, and to `fold` a
    scale of branches that no module of `branches` holds."""
    sum_norms: tuple[str, str] | None = None
    """The norms of the residual stream after each addition (Post-LN), from a block."""
    final_norm: str | None = "model.norm"
    """The norm before the head, from the model; read by measures only."""
    head: str | None = "lm_head"
    """The module that gives the logits, or an `nn.Embedding` whose weight does, from the model; None: it has none. Read
    by measures only."""

    def __post_init__(self) -> None:
        for name in ("norms", "sublayers", "branches", "inputs", "outputs", "sum_norms"):
            pair = getattr(self, name)
            if pair is not None and (isinstance(pair, str) or len(pair) != 2):
                raise UserError(f"layout.{name}={pair!r}: expected two, for attention and the feed-forward network")
        if any(isinstance(paths, str) for paths in self.inputs):
            raise UserError(
                f"layout.inputs={self.inputs!r}: expected two tuples of paths, such as (('attn.qkv',), ('mlp.fc',))"
            )


LLAMA = Layout(
    "model.layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    sublayers=("self_attn", "mlp"),
    inputs=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    outputs=("self_attn.o_proj", "mlp.down_proj"),
)
GEMMA2 = replace(
    LLAMA,
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    branches=("post_attention_layernorm", "post_feedforward_layernorm"),
)
GEMMA2_NORMS = replace(GEMMA2, inputs=((), ()), outputs=None)
GLM4 = replace(
    LLAMA,
    branches=("post_self_attn_layernorm", "post_mlp_layernorm"),
    inputs=(LLAMA.inputs[0], ("mlp.gate_up_proj",)),
)
HYPERCLOVAX = replace(LLAMA, branches=("post_norm1", "post_norm2"))
LLAMA_NORMS = replace(LLAMA, inputs=((), ()), outputs=None)
"""Llama's norms before other projections, as of mixtures of experts and of Phi-3."""
KOLIBRI1 = replace(LLAMA_NORMS, branches=GLM4.branches)
AFMOE = replace(
    LLAMA_NORMS,
    norms=("input_layernorm", "pre_mlp_layernorm"),
    branches=("post_attention_layernorm", "post_mlp_layernorm"),
)
OLMO2 = Layout("model.layers", norms=None, sublayers=LLAMA.sublayers, branches=GEMMA2.branches)
COHERE = Layout("model.layers", norms=None, sublayers=("self_attn", "mlp"))
PHI = replace(COHERE, final_norm="model.final_layernorm")
LLAMA4 = replace(LLAMA_NORMS, sublayers=("self_attn", "feed_forward"))
MULTIMODAL = {"blocks": "model.language_model.layers", "final_norm": "model.language_model.norm"}
GEMMA3_VL = replace(GEMMA2, **MULTIMODAL)
QWEN2_5_VL = replace(LLAMA, **MULTIMODAL)
GPT2 = Layout(
    "transformer.h",
    norms=("ln_1", "ln_2"),
    sublayers=("attn", "mlp"),
    inputs=(("attn.c_attn",), ("mlp.c_fc",)),
    outputs=("attn.c_proj", "mlp.c_proj"),
    final_norm="transformer.ln_f",
)
GPTJ = Layout("transformer.h", norms=None, sublayers=("attn", "mlp"), final_norm="transformer.ln_f")
GPT_NEOX = Layout(
    "gpt_neox.layers",
    norms=None,
    sublayers=("attention", "mlp"),
    final_norm="gpt_neox.final_layer_norm",
)
BERT = Layout(
    "bert.encoder.layer",
    norms=None,
    sublayers=("attention.output.dense", "output.dense"),
    sum_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    final_norm=None,
    head="cls",
)
ENCODER = replace(BERT, blocks="encoder.layer", head=None)
"""BERT without its head, as models of sentences are."""
VIT = replace(LLAMA, blocks="layers", inputs=(LLAMA.inputs[0], ("mlp.up_proj",)), final_norm="norm", head="head")
"""Our Vision Transformer."""
LAYOUTS = (
    *(GEMMA2, GLM4, HYPERCLOVAX, KOLIBRI1, AFMOE, LLAMA, GEMMA2_NORMS, OLMO2, LLAMA_NORMS, COHERE, PHI, LLAMA4),
    *(GEMMA3_VL, QWEN2_5_VL, GPT2, GPTJ, GPT_NEOX, BERT, ENCODER),
)
"""Tried in this order: the first whose modules a model has. COHERE is any block with these two sub-layers."""
BACKBONES = tuple(
    replace(
        layout,
        blocks=layout.blocks.partition(".")[2],
        final_norm=layout.final_norm and layout.final_norm.partition(".")[2],
        head=None,
    )
    for layout in LAYOUTS
    if layout not in (BERT, ENCODER)
)
"""The layouts without the causal model around them, as `AutoModel` gives them."""
AFTER_INPUTS = ("dt_proj",)
"""Further linear layers of a sub-layer that do not read the norm: Doge's reads the values."""
OTHER_SUMS = {
    "BeamDecoderLayer": "multiplies its residual stream by factors of its own",
    "DoryDecoderLayer": "moves between points of a sphere instead of adding",
    "MiniMaxDecoderLayer": "starts its skips after its norms",
}
"""Blocks with the modules of a layout that compute another equation, by class, and in which way."""
HINT = "name its modules: layout=Layout(blocks='path.to.the.list', norms=('ln_1', 'ln_2'), sublayers=('attn', 'mlp'))"


@dataclass(frozen=True)
class Site:
    """One sub-layer of one block of a model: its modules, found by a `Layout`."""

    layer: int
    """Counts from 1."""
    part: str
    """"attention" or "ffn"."""
    block: Any
    """Without the wrapper of `torch.compile` or of activation checkpointing."""
    norm: Any
    """Before the sub-layer; None if the layout does not name it."""
    sublayer: Any
    branch: Any
    """Its output is added to the residual stream."""
    inputs: list[Any]
    """The linear layers after the norm; empty if the layout does not name them."""
    output: Any
    """The last linear layer; None if the layout does not name it."""
    sum_norm: Any
    """The norm of the sum; None if the layout does not name it."""


def pre_norm_sites(model: nn.Module, layout: Layout | None = None) -> list[Site]:
    """`find_sites` of a model that can take a strategy.

    Raises:
        UserError: as `find_sites`, the model is inside a wrapper such as DDP or PEFT's, or sharded by FSDP1, no norms
            before the sub-layers are known, two sub-layers share a norm or a branch, or, without a layout, a block
            computes another equation (`OTHER_SUMS`) or has modules that its known layout does not name.
    """
    if not isinstance(model, nn.Module):
        remedy = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise UserError(f"model is a {type(model).__name__}: expected an nn.Module{remedy}")
    refuse_fsdp1(model)
    by_name = layout is None
    layout = known_layout(model) if layout is None else layout
    if layout is None:
        for path, module in model.named_modules():
            if known_layout(module) is not None:
                raise UserError(f"{type(model).__name__} wraps a {type(module).__name__}: pass its module {path!r}")
        if known_layout(model, BACKBONES) is not None:
            raise UserError(
                f"{type(model).__name__} has the modules of a language model without its head: pass the model around "
                f"it, or {HINT}"
            )
        raise UserError(f"{type(model).__name__} has an unknown layout; {HINT}")
    sites = find_sites(model, layout)
    if layout.norms is None:
        name = type(model).__name__
        if layout.sum_norms is not None:
            raise UserError(f"{name} is Post-LN, it norms the sums: a strategy needs a norm before each sub-layer")
        raise UserError(
            f"{name} has no norms before its sub-layers that are known (OLMo 2 and 3 norm their outputs, parallel "
            f"blocks may share one norm); if each sub-layer has one, name them: layout=Layout({layout.blocks!r}, "
            f"norms=('...', '...'), sublayers={layout.sublayers!r})"
        )
    if by_name:
        refuse_other_blocks(model, sites, layout)
    owner: dict[int, Site] = {}
    for site in sites:
        for kind, module in {"norm": site.norm, "branch": site.branch}.items():
            first = owner.setdefault(id(module), site)
            if first is not site:
                raise UserError(
                    f"layer {site.layer}, {site.part}: its {kind} is also that of layer {first.layer}, {first.part}; a "
                    "strategy needs one for each sub-layer"
                )
    return sites


def refuse_other_blocks(model: nn.Module, sites: list[Site], layout: Layout) -> None:
    """Raise a UserError if a block computes another equation or has modules that a known layout does not name."""
    paths = [path for pair in (layout.norms, layout.sublayers, layout.branches) for path in pair or ()]
    named = {path.partition(".")[0] for path in paths}
    for block in [site.block for site in sites[::2]]:
        reasons = [OTHER_SUMS[base.__name__] for base in type(block).__mro__ if base.__name__ in OTHER_SUMS]
        if getattr(block, "norm_after", False):  # Molmo2's switch
            reasons.append("norms the outputs of its sub-layers (norm_after)")
        if reasons:
            raise UserError(f"{type(model).__name__}: {type(block).__name__} is no Pre-LN block: it {reasons[0]}")
        if others := [name for name, child in block.named_children() if name not in named and has_effect(child)]:
            listed = ", ".join(others)
            raise UserError(f"{type(model).__name__}: its blocks have other modules than Pre-LN: {listed}; {HINT}")


def has_effect(module: nn.Module) -> bool:
    """Whether a module has parameters or is a norm, which may have none."""
    is_norm = "Norm" in type(module).__name__ and not isinstance(module, IdentityNorm)
    return is_norm or any(True for _ in module.parameters())


def find_sites(model: nn.Module, layout: Layout) -> list[Site]:
    """The two sub-layers of every block of any module, first to last.

    Raises:
        UserError: `layout` is no `Layout`, or the model has no module that it names.
    """
    if not isinstance(layout, Layout):
        raise UserError(f"layout={layout!r} is not a Layout; {HINT}")
    blocks: Any = submodule(model, layout.blocks, type(model).__name__)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential | nn.ModuleDict) or not len(blocks):
        raise UserError(
            f"layout.blocks={layout.blocks!r} is a {type(blocks).__name__} of {len(list(blocks.children()))} modules; "
            "expected an nn.ModuleList, nn.Sequential or nn.ModuleDict of blocks"
        )
    inner = [unwrapped(block) for block in (blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)]
    return [site_of(layout, layer, block, index) for layer, block in enumerate(inner, start=1) for index in (0, 1)]


def unwrapped(module: Any) -> Any:
    """A module without the wrappers of `torch.compile` and of `checkpoint_wrapper`."""
    while (inner := getattr(module, "_orig_mod", getattr(module, "_checkpoint_wrapped_module", None))) is not None:
        module = inner
    return module


def site_of(layout: Layout, layer: int, block: Any, index: int) -> Site:
    """Attention (index 0) or the feed-forward network (1) of a block; raises like `submodule`."""

    def at(path: str) -> Any:
        return unwrapped(submodule(block, path, f"{layout.blocks}.{layer - 1}"))

    def module(pair: tuple[str, str] | None) -> Any:
        return at(pair[index]) if pair else None

    sublayer, branch = module(layout.sublayers), module(layout.branches)
    return Site(
        layer,
        ("attention", "ffn")[index],
        block,
        norm=module(layout.norms),
        sublayer=sublayer,
        branch=sublayer if branch is None or isinstance(branch, nn.Identity) else branch,
        inputs=[at(path) for path in layout.inputs[index]],
        output=module(layout.outputs),
        sum_norm=module(layout.sum_norms),
    )


def names_all_inputs(site: Site) -> bool:
    """Whether no other linear layer of a sub-layer has as many inputs as those of `layout.inputs`.

    Such a layer, as the gate of an attention or a router, may read the norm too. True if the layout names none.
    """
    named = {inner for module in (*site.inputs, site.output) if module is not None for inner in module.modules()}
    widths = {getattr(module, "in_features", None) for module in site.inputs}
    return not any(
        isinstance(module, nn.Linear) and module.in_features in widths and module not in named
        for name, module in site.sublayer.named_modules()
        if name not in AFTER_INPUTS
    )


def require_inputs(sites: Iterable[Site], remedy: str = "") -> None:
    """Check that the layout names the linear layers after the norms.

    Raises:
        UserError: it does not; the message ends in `remedy`.
    """
    if not all(site.inputs for site in sites):
        raise UserError(f"layout.inputs is missing: the linear layers after the norms{remedy}")


def branch_multiplier(block: Any) -> float:
    """The factor of a block's branches, such as Granite's and MiniCPM3's; 1 for other models."""
    return getattr(block, "residual_multiplier", getattr(block, "residual_scale", 1.0))


def hidden_input(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states among the arguments of a block or a sub-layer.

    Raises:
        UserError: they are passed under another name.
    """
    if not args and "hidden_states" not in kwargs:
        raise UserError(
            f"a block is called with {', '.join(kwargs) or 'nothing'}: pass the hidden states first, without a name"
        )
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(y: Any) -> Tensor:
    """The hidden states that a block or a sub-layer returns; some return a tuple."""
    return y[0] if isinstance(y, tuple) else y


def with_hidden(y: Any, x: Tensor) -> Any:
    """The output y of a block or a sub-layer with the hidden states x."""
    return (x, *y[1:]) if isinstance(y, tuple) else x


def zero_output(module: nn.Module, args: Any, y: Any) -> Any:
    """A forward hook that replaces the hidden states that a sub-layer returns by zeros."""
    return with_hidden(y, torch.zeros_like(hidden_output(y)))


def logits_output(y: Any) -> Tensor:
    """The logits that a language model returns: a tensor, `.logits`, ["logits"], or the first of several."""
    if isinstance(y, Tensor):
        return y
    if isinstance(y, Mapping):  # also the outputs of `transformers`
        return y["logits"] if "logits" in y else next(iter(y.values()))
    return y.logits if hasattr(y, "logits") else y[0]


def known_layout(model: nn.Module, layouts: Iterable[Layout] = LAYOUTS) -> Layout | None:
    """The layout of a causal language model of `transformers`, by the names of its modules.

    It is the first of `layouts` whose modules the model has, with its blocks in an `nn.ModuleList`, and that names all
    inputs or none.
    """
    for layout in layouts:
        try:
            sites = find_sites(model, layout)
            submodule(model, layout.final_norm or "", "")
        except UserError:
            continue
        listed = isinstance(model.get_submodule(layout.blocks), nn.ModuleList)
        if listed and all(names_all_inputs(site) for site in sites):
            return layout
    return None


def submodule(module: nn.Module, path: str, name: str) -> Any:
    """`module.get_submodule(path)`.

    Raises:
        UserError: there is none; the message names the module and the path.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise UserError(f"{name} has no module {path!r}") from None
