"""One view of every model that is measured: an embedding, blocks and a head.

The models are our decoder, language models of `transformers`, any others with a `Layout`, and our Vision Transformer,
whose tokens are the patches of images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import ActivationHook, Block, Decoder, scale
from cod_lightning.nn.layouts import (
    BACKBONES,
    BERT,
    ENCODER,
    HINT,
    VIT,
    Layout,
    branch_multiplier,
    find_sites,
    hidden_input,
    hidden_output,
    known_layout,
    logits_output,
    unwrapped,
)
from cod_lightning.nn.norms import IdentityNorm
from cod_lightning.nn.parallel import checkpointed
from cod_lightning.nn.spec import why_not_composed
from cod_lightning.nn.vit import Images, VisionTransformer

POSITIONS = re.compile(r"(wpe|pos)[^.]*$")
"""Paths of tables of positions, which hold no tokens."""
Batch = Tensor | Images
"""Tokens [batch, length], or images."""


@dataclass(frozen=True)
class ModelAdapter:
    """Access to the blocks of a model.

    Args:
        model: a `Decoder`, a `VisionTransformer`, a model of `transformers` of a family in docs/models.md, or a model
            whose forward takes tokens [batch, length] and returns logits: a tensor, `.logits`, ["logits"], or the first
            of several. Logits are for the next token, except BERT's. Only names are checked here; measures run the
            model to prove its layout.
        name: for tables and figures.
        decode: the text of a token, for results that name tokens; None: they have ids only.
        layout: the `Layout` of the model's blocks, their sub-layers, the final norm and the head; None: by the names of
            its modules.

    Raises:
        UserError: the model lacks modules that the layout names, or its layout is not known.
    """

    model: nn.Module
    name: str = "model"
    decode: Callable[[int], str] | None = None
    layout: Any = None

    def __post_init__(self):
        object.__setattr__(self, "layout", layout_of(self.model, self.name, self.layout))

    @property
    def blocks(self) -> list[nn.Module]:
        blocks: Any = self.model.get_submodule(self.layout.blocks)
        return list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def reads_images(self) -> bool:
        """Whether its batches are `Images`."""
        return isinstance(self.model, VisionTransformer)

    @property
    def predicts_next(self) -> bool:
        """Whether the logits are for the next token; where a token attends to all others, as in BERT, they are not."""
        if self.layout in (BERT, ENCODER):
            return getattr(self.config, "is_decoder", False)
        bidirectional = getattr(self.config, "use_bidirectional_attention", None)  # Gemma's
        return getattr(self.config, "is_causal", True) is not False and bidirectional not in (True, "all")

    @property
    def why_no_loss(self) -> str:
        """Why it has no loss of next tokens or labels, or an empty string."""
        return self.why_no_head if self.predicts_next else f"{family(self.model)} does not predict the next token"

    @property
    def why_no_head(self) -> str:
        """Why hidden states do not give logits, or an empty string."""
        name, layout = family(self.model), self.layout
        if layout.head is None:
            return f"{name} has no head, which gives logits"
        for field, path in (("final_norm", layout.final_norm), ("head", layout.head)):
            if path and not has_module(self.model, path):
                return f"{name} has no module {path!r}, its {field}: name it in layout=Layout(..., {field}=...)"
        return ""

    @property
    def why_not_sparse(self) -> str:
        """Why measures of the blocks' linear layers do not apply, or an empty string.

        `transformers` 5 keeps the experts of a block in one parameter [experts, out, in].
        """
        for module in (module for block in self.blocks for module in block.modules()):
            if hasattr(module, "base_layer"):  # of peft
                return "its linear layers have adapters: merge them first, as in model.merge_and_unload()"
            is_convolution = type(module).__name__.startswith("Conv")
            if not is_convolution and any(weight.ndim > 2 for weight in module.parameters(recurse=False)):
                return "its experts are not linear layers; sparsity does not support mixtures of experts"
        return ""

    @property
    def why_not_composed(self) -> str:
        """Why Jacobians of blocks do not multiply to that of several blocks, or an empty string."""
        return why_not_composed([block.spec for block in map(unwrapped, self.blocks) if isinstance(block, Block)])

    def evenly_spaced(self, count: int) -> list[int]:
        """At most `count` layers, counting from 1, evenly from the first to the last."""
        return sorted({1 + index * (self.depth - 1) // max(count - 1, 1) for index in range(count)})

    @property
    def config(self) -> Any:
        """The configuration of the blocks; for a multimodal model, that of its language model."""
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def config_value(self, name: str, default: Any) -> Any:
        """A field of the configuration, or `default` where it is missing or None."""
        value = getattr(self.config, name, None)
        return default if value is None else value

    @property
    def hidden(self) -> int:
        return self.head_weight.shape[1]

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary or classes, hidden]; without a head that has it, of the embeddings.

        Raises:
            UserError: neither has it, or it is quantised.
        """
        if (weight := self.known_weight) is None:
            raise UserError(f"{self.name}: neither its head nor an nn.Embedding has a weight [vocabulary, hidden]")
        return weight

    @property
    def known_weight(self) -> Tensor | None:
        """`head_weight` if there is one."""
        model: Any = self.model
        head: Any = None
        if not self.why_no_head:
            head = model.get_output_embeddings() if self.layout is BERT else model.get_submodule(self.layout.head)
        if not hasattr(head, "weight"):
            tables = [
                module
                for path, module in model.named_modules()
                if isinstance(module, nn.Embedding) and not POSITIONS.search(path)
            ]
            # The largest of several tables is most likely that of the tokens.
            largest = max(tables, key=lambda module: module.num_embeddings, default=None)
            head = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else largest
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor | None):
            raise UserError(f"{self.name}: its {type(head).__name__} is quantised: dequantise the model first")
        return weight

    @property
    def positions(self) -> int | None:
        """Number of position embeddings, the length of the longest sequence; None: it has none."""
        for path, module in self.model.named_modules():
            if path.rpartition(".")[2] in ("wpe", "position_embeddings") and isinstance(module, nn.Embedding):
                return module.num_embeddings
        return None

    @property
    def device(self) -> torch.device:
        weight = self.known_weight
        return (next(self.model.parameters()) if weight is None else weight).device

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]: final norm, then head, scaled as the model does."""
        if self.why_no_head:
            raise UserError(f"{self.name}: {self.why_no_head}")
        if self.layout.final_norm:
            x = self.model.get_submodule(self.layout.final_norm)(x)
        factor = self.config_value("logit_scale", 1) / self.config_value("logits_scaling", 1)  # Cohere; Granite
        head: Any = self.model.get_submodule(self.layout.head)
        logits = scale(F.linear(x, head.weight) if isinstance(head, nn.Embedding) else head(x), factor)
        cap = self.config_value("final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def logits(self, batch: Batch, hook: ActivationHook | None = None) -> Tensor:
        """Logits [batch, length, vocabulary], for images [batch, 1, classes], without a head what the model returns.

        A model that gives those of the last token only, as nanoGPT without targets, gets the others from its head.
        `hook` gets every layer's activations.
        """
        if isinstance(self.model, Decoder | VisionTransformer):
            return self.output(batch, hook)
        states: list[Tensor] = []
        with self.blocks[-1].register_forward_hook(lambda block, args, y: states.append(hidden_output(y))):
            logits = self.output(batch, hook)
        return self.head(states[-1]) if logits.shape[1] == 1 < states[-1].shape[1] else logits

    def output(
        self, batch: Batch, hook: ActivationHook | None = None, keep: Tensor | None = None, last: int = 0
    ) -> Tensor:
        """The model's output for a batch: logits, without a head its first output.

        Args:
            batch: tokens [batch, length] or images.
            hook: gets every layer's activations.
            keep: False for padding [batch, length], which a token does not attend to; causal models need none, because
                padding follows the other tokens.
            last: only the logits of this many last tokens, if the model's `forward` has `logits_to_keep`; 0: all.
        """
        parameters = signature(self.model.forward).parameters
        options: dict[str, Any] = {}
        if last and "logits_to_keep" in parameters:
            options["logits_to_keep"] = last
        with torch.compiler.set_stance("force_eager"), without_accelerate(self.model), ExitStack() as handles:
            if isinstance(self.model, FSDPModule):
                handles.callback(self.model.unshard)  # its own parameters, with which blocks and head run alone
            if isinstance(batch, Images):
                return self.model(batch.pixels, hook=hook)[:, None]
            if isinstance(self.model, Decoder):
                return self.model(batch, hook=hook, **options)
            for handle in [] if hook is None else self.register_hooks(hook):
                handles.enter_context(handle)
            if keep is not None and not self.predicts_next:
                options["attention_mask"] = keep.long()
            takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
            if "use_cache" in parameters or (takes_any and hasattr(self.config, "use_cache")):
                options["use_cache"] = False
            if "input_ids" in parameters:
                return logits_output(self.model(input_ids=batch, **options))
            return logits_output(self.model(batch, **options))

    @torch.no_grad()
    def run(self, batch: Batch, hook: ActivationHook | None = None, keep: Tensor | None = None) -> None:
        """Run the model for its activations: without gradients, and with the last token's logits only, if it can.

        The logits of a whole batch can take more memory than the model. The arguments are those of `output`.
        """
        self.output(batch, hook, keep, last=1)

    def register_hooks(self, hook: ActivationHook) -> Iterator[RemovableHandle]:
        """Register module hooks on a model that is not ours, which call `hook` as our models do."""
        shape = torch.Size()

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal shape
            x = hidden_input(args, kwargs)
            shape = x.shape
            hook("embedding", 0, x)

        def after(name: str, layer: int, factor: float = 1) -> Callable[[nn.Module, Any, Any], None]:
            def call(module: nn.Module, args: Any, y: Any) -> None:
                x = hidden_output(y)
                # OPT merges batch and length before its FFN.
                hook(name, layer, scale(x.reshape(shape) if x.ndim < len(shape) else x, factor))

            return call

        yield self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        for site in find_sites(self.model, self.layout):
            factor = branch_multiplier(site.block)
            yield site.branch.register_forward_hook(after(site.part, site.layer, factor))
        for layer, block in enumerate(self.blocks, start=1):
            yield block.register_forward_hook(after("residual", layer))

    @torch.no_grad()
    def block_functions(
        self, batch: Batch, keep: Tensor | None = None
    ) -> tuple[list[Tensor], list[Callable[[Tensor], Tensor]]]:
        """The input of every block [batch, length, hidden] on a batch, and every block as a function of its input.

        The functions keep the other arguments of the blocks (rotary embeddings, masks), so they take hidden states
        with the same batch size and length, in any order. They run compiled blocks uncompiled. Peri-LN's norm of the
        embeddings belongs to the first input and not to the first block.

        Args:
            batch: tokens [batch, length] or images.
            keep: as for `output`.
        """
        inputs: list[Tensor] = []
        functions: list[Callable[[Tensor], Tensor]] = []

        def capture(module: Any, args: tuple, kwargs: dict) -> None:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            x = hidden_input(args, kwargs).detach()
            module = unwrapped(module)
            if isinstance(module, Block):
                x = x if inputs else module.entry_norm(x)
                module = plain_block(module, entry_norm=bool(inputs))

            def function(x: Tensor) -> Tensor:
                with torch.compiler.set_stance("force_eager"):
                    return hidden_output(module(x, *args[1:], **others))

            inputs.append(x)
            functions.append(function)

        with ExitStack() as handles:
            for block in self.blocks:
                handles.enter_context(block.register_forward_pre_hook(capture, with_kwargs=True))
            self.run(batch, keep=keep)
        return inputs, functions

    def stream_at(self, layer: int, x: Tensor, embedding: Tensor) -> Tensor:
        """The residual stream to which a block adds: its input x, or what our blocks make of it first.

        Args:
            layer: counts from 1.
            x: [..., hidden].
            embedding: the input of the first block at the same tokens [..., hidden].
        """
        block = unwrapped(self.blocks[layer - 1])
        return block.mix_embedding(block.entry_norm(x), embedding) if isinstance(block, Block) else x

    @contextmanager
    def with_blocks(self, blocks: Sequence[nn.Module]) -> Generator[None]:
        """Replace the model's blocks by `blocks` inside the `with`, to copy the model with fewer blocks.

        A block that moves gets the mask and the positions of its new place: to run blocks in another order, call
        `block_functions`.
        """
        path, _, name = self.layout.blocks.rpartition(".")
        stack = self.model.get_submodule(path)
        original = getattr(stack, name)
        setattr(stack, name, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(stack, name, original)


@contextmanager
def without_accelerate(model: nn.Module) -> Generator[None]:
    """Call the original `forward` inside the `with`, without the wrapper of `accelerate`: blocks that run alone have
    none.
    """
    own: dict[str, Any] = vars(model)
    if not {"forward", "_original_forward"} <= own.keys():
        yield
        return
    wrapped, own["forward"] = own["forward"], own["_original_forward"]
    try:
        yield
    finally:
        own["forward"] = wrapped


def layout_of(model: nn.Module, name: str, layout: Layout | None) -> Layout:
    """The `Layout` of a model; arguments and errors are those of `ModelAdapter`."""
    if isinstance(model, VisionTransformer):
        return VIT
    if layout is not None:
        find_sites(model, layout)  # raises, naming what is missing
        return layout
    if (layout := known_layout(model) or known_layout(model, BACKBONES)) is None:
        raise UserError(
            f"{name}: {family(model)} has an unknown layout and cannot be measured; docs/models.md lists the families "
            f"that can, for others {HINT}"
        )
    return layout


def has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def family(model: Any) -> str:
    """The family of a model of `transformers`; of any other its class."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def plain_block(block: Block, entry_norm: bool) -> Block:
    """The block without the checkpoints of `parallelise`, through which torch.func does not pass.

    It shares all modules, and lacks its first norm unless `entry_norm`.
    """
    has_checkpoints = getattr(vars(block).get("forward"), "func", None) is checkpointed
    if not has_checkpoints and (entry_norm or isinstance(block.entry_norm, IdentityNorm)):
        return block
    other = copy(block)
    if has_checkpoints:
        del other.__dict__["forward"]
    if not entry_norm:
        other._modules = {**block._modules, "entry_norm": IdentityNorm()}
    return other
