"""One view of every model that is measured: an embedding, blocks and a head.

The models are our decoder, causal language models of `transformers`, and our Vision Transformer, whose tokens are the
patches of images.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import ActivationHook, Decoder
from cod_lightning.nn.pretrained import load_checkpoint
from cod_lightning.nn.vit import VisionTransformer

LAYOUTS = (
    ("model", "layers", "norm"),  # Llama and models like it
    ("model.language_model", "layers", "norm"),  # Qwen2.5-VL
    ("transformer", "h", "ln_f"),  # GPT-2
    ("bert.encoder", "layer", None),  # BERT, whose blocks end with their own norms
)
"""Names of the stack, of its list of blocks and of its final norm in models of `transformers`."""


@dataclass(frozen=True)
class Images:
    """A batch of images with labels, for a Vision Transformer.

    Patches count as tokens, the class token does not. The target is the label, predicted from the class token, so
    losses are in nats per image.
    """

    pixels: Tensor
    """[batch, 3, size, size]."""
    labels: Tensor
    """[batch]; an image with label `IGNORE` does not count."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


Batch = Tensor | Images
"""Tokens [batch, length], or images."""


@dataclass(frozen=True)
class ModelAdapter:
    """Access to the blocks of a model.

    Args:
        model: a `Decoder`, a `VisionTransformer`, or a model of `transformers` with one of the `LAYOUTS`: Llama,
            Mistral, Qwen2, Qwen3, DeepSeek-LLM, OLMo2, Qwen2.5-VL on text, GPT-2, or BERT, whose logits are not for the
            next token.
        name: for tables and figures.

    Raises:
        UserError: the model has none of the layouts.
    """

    model: nn.Module
    name: str = "model"

    def __post_init__(self):
        _ = self.layout

    @cached_property
    def layout(self) -> tuple[nn.Module, str, nn.Module]:
        """The stack, the name of its list of blocks, and the final norm."""
        if isinstance(self.model, VisionTransformer):
            return self.model, "layers", self.model.norm
        for path, blocks, norm in LAYOUTS:
            try:
                stack = self.model.get_submodule(path)
                final_norm = stack.get_submodule(norm) if norm else nn.Identity()
                if isinstance(stack.get_submodule(blocks), nn.ModuleList):
                    return stack, blocks, final_norm
            except AttributeError:
                continue
        raise UserError(
            f"{self.name}: {type(self.model).__name__} has an unknown layout: expected blocks at model.layers (Llama, "
            "Mistral, Qwen2, Qwen3, DeepSeek-LLM, OLMo2), transformer.h (GPT-2), model.language_model.layers "
            "(Qwen2.5-VL) or bert.encoder.layer (BERT)"
        )

    @property
    def blocks(self) -> list[nn.Module]:
        stack, name, _ = self.layout
        return list(getattr(stack, name))

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def evenly_spaced(self, count: int) -> list[int]:
        """At most `count` layers, counting from 1, evenly from the first to the last."""
        return sorted({1 + index * (self.depth - 1) // max(count - 1, 1) for index in range(count)})

    @property
    def config(self) -> Any:
        """The configuration of the blocks; for a multimodal model, that of its language model."""
        config: Any = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def hidden(self) -> int:
        return self.head_weight.shape[1]

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary or classes, hidden]."""
        model: Any = self.model
        if isinstance(model, VisionTransformer):
            return model.head.weight
        return (model.lm_head if hasattr(model, "lm_head") else model.get_output_embeddings()).weight

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden]: final norm, then head."""
        name = next(name for name in ("lm_head", "head", "cls") if hasattr(self.model, name))
        return self.model.get_submodule(name)(self.layout[2](x))

    def logits(self, batch: Batch, hook: ActivationHook | None = None) -> Tensor:
        """Logits [batch, length, vocabulary], for images [batch, 1, classes]; `hook` gets every layer's activations."""
        with torch.compiler.set_stance("force_eager"), ExitStack() as handles:
            if isinstance(batch, Images):
                return self.model(batch.pixels, hook=hook)[:, None]
            if isinstance(self.model, Decoder):
                return self.model(batch, hook=hook)
            for handle in [] if hook is None else self.register_hooks(hook):
                handles.enter_context(handle)
            return self.model(input_ids=batch, use_cache=False).logits

    def register_hooks(self, hook: ActivationHook) -> Iterator[RemovableHandle]:
        """Register module hooks on a model of `transformers` that call `hook` as our models do."""

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hook("embedding", 0, hidden_input(args, kwargs))

        yield self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        for layer, block in enumerate(self.blocks, start=1):
            for name, module in zip(("attention", "ffn", "residual"), (*sublayers(block), block), strict=True):

                def after(module: nn.Module, args: Any, y: Any, name: str = name, layer: int = layer) -> None:
                    hook(name, layer, hidden_output(y))

                yield module.register_forward_hook(after)

    @torch.no_grad()
    def block_functions(self, batch: Batch) -> tuple[list[Tensor], list[Callable[[Tensor], Tensor]]]:
        """The input of every block [batch, length, hidden] on a batch, and every block as a function of its input.

        The functions keep the other arguments of the blocks (rotary embeddings, masks), so they take hidden states
        with the same batch size and length.
        """
        inputs: list[Tensor] = []
        functions: list[Callable[[Tensor], Tensor]] = []

        def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            inputs.append(hidden_input(args, kwargs).detach())
            functions.append(lambda x: hidden_output(module(x, *args[1:], **others)))

        with ExitStack() as handles:
            for block in self.blocks:
                handles.enter_context(block.register_forward_pre_hook(capture, with_kwargs=True))
            self.logits(batch)
        return inputs, functions

    @contextmanager
    def with_blocks(self, blocks: Sequence[nn.Module]) -> Generator[None]:
        """Replace the model's blocks by `blocks`, in this order, inside the `with`."""
        stack, name, _ = self.layout
        original = getattr(stack, name)
        setattr(stack, name, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(stack, name, original)


def hidden_input(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(y: Any) -> Tensor:
    """The hidden states that a block or a sub-layer returns; some return a tuple."""
    return y[0] if isinstance(y, tuple) else y


def sublayers(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules of a `transformers` block whose outputs are added to the residual stream."""
    if hasattr(block, "post_feedforward_layernorm"):  # OLMo2 normalises the outputs of its sub-layers
        return block.get_submodule("post_attention_layernorm"), block.get_submodule("post_feedforward_layernorm")
    if hasattr(block, "intermediate"):  # BERT adds the residual stream inside its sub-layers
        return block.get_submodule("attention.output.dense"), block.get_submodule("output.dense")
    return block.get_submodule("self_attn" if hasattr(block, "self_attn") else "attn"), block.get_submodule("mlp")


def load_pretrained(
    name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[ModelAdapter, Any]:
    """Load a causal language model of `transformers` and its tokenizer; see `load_checkpoint`.

    Raises:
        UserError: the model cannot be loaded whole, or has an unknown layout.
    """
    checkpoint = load_checkpoint(name, dtype)
    return ModelAdapter(checkpoint.model.to(device), Path(name).name), checkpoint.tokenizer()
