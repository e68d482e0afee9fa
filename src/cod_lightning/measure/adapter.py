"""Any causal language model as an embedding, blocks and a head: our decoder, or one of `transformers`.

And our Vision Transformer, whose tokens are the patches of images: see `Images`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import ActivationHook, Decoder
from cod_lightning.nn.huggingface import import_transformers, quiet_transformers
from cod_lightning.nn.vit import VisionTransformer

PLACES = (
    ("model", "layers", "norm"),
    ("model.language_model", "layers", "norm"),
    ("transformer", "h", "ln_f"),
    ("bert.encoder", "layer", None),
)
"""Where models of `transformers` keep their stack, its blocks and its final norm: LLaMA and kin, the language branch of
Qwen2.5-VL, GPT-2, and BERT, whose blocks end with norms of their own."""


@dataclass(frozen=True)
class Images:
    """Images with labels, which stand in the place of a batch of tokens [rows, length] for a Vision Transformer.

    Its patches count as tokens, but for the class token; its targets are the labels, which are read at the class
    token, so that losses are nats per image.
    """

    pixels: Tensor
    """[rows, 3, size, size]."""
    labels: Tensor
    """[rows]; `IGNORE`: neither the image nor its patches count."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


Batch = Tensor | Images
"""Tokens [rows, length], or images."""


@dataclass(frozen=True)
class ModelAdapter:
    """A causal language model, or a Vision Transformer, taken apart.

    Args:
        model: a `Decoder`, a `VisionTransformer`, or a causal language model of `transformers` (Llama, Mistral, Qwen2,
            Qwen3, DeepSeek-LLM, OLMo2, Qwen2.5-VL on text, GPT-2, and others that are laid out as one of these), or
            BERT, whose logits are not of the next token.
        name: for tables and figures.

    Raises:
        UserError: no blocks are found in `model`.
    """

    model: nn.Module
    name: str = "model"

    def __post_init__(self):
        if self.place is None:
            raise UserError(
                f"{self.name}: {type(self.model).__name__} is not laid out as a model that can be measured: expected "
                "blocks at model.layers (Llama, Mistral, Qwen2, Qwen3, DeepSeek-LLM, OLMo2), transformer.h (GPT-2), "
                "model.language_model.layers (Qwen2.5-VL) or bert.encoder.layer (BERT)"
            )

    @property
    def place(self) -> tuple[nn.Module, str, nn.Module] | None:
        """The stack, the name of its list of blocks, and its final norm, which may do nothing."""
        if isinstance(self.model, VisionTransformer):
            return self.model, "layers", self.model.norm
        for path, blocks, norm_name in PLACES:
            try:
                stack = self.model.get_submodule(path)
                norm = stack.get_submodule(norm_name) if norm_name else nn.Identity()
                found = stack.get_submodule(blocks)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList):
                return stack, blocks, norm
        return None

    @property
    def blocks(self) -> list[nn.Module]:
        assert self.place is not None
        return list(getattr(self.place[0], self.place[1]))

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def evenly_spaced(self, count: int) -> list[int]:
        """At most `count` layers, evenly from the first to the last."""
        return sorted({1 + place * (self.depth - 1) // max(count - 1, 1) for place in range(count)})

    @property
    def config(self) -> Any:
        """What says the shape of the blocks: of a model that also sees, the part of its configuration on language."""
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
        """Logits [..., vocabulary] of a stream [..., hidden], through the final norm."""
        assert self.place is not None
        name = next(name for name in ("lm_head", "head", "cls") if hasattr(self.model, name))
        return self.model.get_submodule(name)(self.place[2](x))

    def logits(self, tokens: Batch, hook: ActivationHook | None = None) -> Tensor:
        """Logits [rows, length, vocabulary] of tokens [rows, length]; `hook` gets every layer's activations.

        Of images those of the class token alone, [rows, 1, classes].
        """
        with torch.compiler.set_stance("force_eager"):
            if isinstance(tokens, Images):
                return self.model(tokens.pixels, hook=hook)[:, None]
            if isinstance(self.model, Decoder):
                return self.model(tokens, hook=hook)
            handles = [] if hook is None else self.register_hooks(hook)
            try:
                return self.model(input_ids=tokens, use_cache=False).logits
            finally:
                for handle in handles:
                    handle.remove()

    def register_hooks(self, hook: ActivationHook) -> list[Any]:
        """Register hooks on a model of `transformers` that call `hook`."""

        def first(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hook("embedding", 0, args[0] if args else kwargs["hidden_states"])

        handles: list[Any] = [self.blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
        for layer, block in enumerate(self.blocks, start=1):
            for name, module in zip(("attention", "ffn", "residual"), (*sublayers(block), block), strict=True):

                def after(module: nn.Module, args: Any, y: Any, name: str = name, layer: int = layer) -> None:
                    hook(name, layer, y[0] if isinstance(y, tuple) else y)

                handles.append(module.register_forward_hook(after))
        return handles

    def block_functions(self, tokens: Batch) -> tuple[list[Tensor], list[Callable[[Tensor], Tensor]]]:
        """The inputs of all blocks [rows, length, hidden] on `tokens`, and every block as a function of its input.

        The functions hold what else a block is given (rotary embeddings, masks) for rows of this number and length.
        """
        inputs: list[Tensor] = []
        functions: list[Callable[[Tensor], Tensor]] = []

        def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
            rest = args[1:]
            named = {key: value for key, value in kwargs.items() if key != "hidden_states"}

            def function(x: Tensor) -> Tensor:
                y = module(x, *rest, **named)
                return y[0] if isinstance(y, tuple) else y

            inputs.append((args[0] if args else kwargs["hidden_states"]).detach())
            functions.append(function)

        handles = [block.register_forward_pre_hook(capture, with_kwargs=True) for block in self.blocks]
        try:
            with torch.no_grad():
                self.logits(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return inputs, functions

    @contextmanager
    def with_blocks(self, blocks: Sequence[nn.Module]) -> Generator[None]:
        """Let the model consist of `blocks`, in their order, inside the `with`; they keep what they have learned."""
        assert self.place is not None
        stack, name, _ = self.place
        original = getattr(stack, name)
        setattr(stack, name, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(stack, name, original)


def sublayers(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules of a `transformers` block whose outputs are added to the stream."""
    if hasattr(block, "post_feedforward_layernorm"):  # OLMo2: norms stand behind the sub-layers
        return block.get_submodule("post_attention_layernorm"), block.get_submodule("post_feedforward_layernorm")
    if hasattr(block, "intermediate"):  # BERT: the sub-layers' last modules add the stream themselves
        return block.get_submodule("attention.output.dense"), block.get_submodule("output.dense")
    return block.get_submodule("self_attn" if hasattr(block, "self_attn") else "attn"), block.get_submodule("mlp")


def load_pretrained(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[ModelAdapter, Any]:
    """A causal language model of `transformers` with its tokenizer, from a folder or by its name on the hub.

    Raises:
        UserError: transformers is not installed, or there is no such model.
    """
    transformers = import_transformers(name)
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            sees = hasattr(config, "vision_config")
            kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
            model = kind.from_pretrained(name, dtype=dtype, trust_remote_code=False).to(device).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and safetensors raise many kinds on files that are damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: not a causal language model of transformers: {reason}") from error
    return ModelAdapter(model, Path(name).name), tokenizer
