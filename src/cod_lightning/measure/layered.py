"""Any causal language model as an embedding, blocks and a head: our decoder, or one of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.exchange import library, quiet

Visit = Callable[[str, int, Tensor], object]
"""Called with (`embedding` | `attention` | `ffn` | `residual`, layer, tensor [rows, length, hidden]); layers count from
1, the embedding is layer 0. `attention` and `ffn` are what a sub-layer adds to the stream, `residual` is a block's
output."""

PLACES = (("model", "layers", "norm"), ("transformer", "h", "ln_f"))
"""Where models of `transformers` keep their stack, its blocks and its final norm: LLaMA and kin, GPT-2."""


@dataclass(frozen=True)
class Layered:
    """A causal language model, taken apart.

    Args:
        model: a `Decoder`, or a causal language model of `transformers` (Llama, Mistral, Qwen2, Qwen3, DeepSeek-LLM,
            OLMo2, GPT-2, and others that are laid out as one of these).
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
                "blocks at model.layers (Llama, Mistral, Qwen2, Qwen3, DeepSeek-LLM, OLMo2) or transformer.h (GPT-2)"
            )

    @property
    def place(self) -> tuple[nn.Module, str, nn.Module] | None:
        """The stack, the name of its list of blocks, and its final norm."""
        for stack_name, blocks, norm_name in PLACES:
            stack = getattr(self.model, stack_name, None)
            norm = getattr(stack, norm_name, None)
            found = isinstance(getattr(stack, blocks, None), nn.ModuleList)
            if found and isinstance(stack, nn.Module) and isinstance(norm, nn.Module):
                return stack, blocks, norm
        return None

    @property
    def blocks(self) -> list[nn.Module]:
        assert self.place is not None
        return list(getattr(self.place[0], self.place[1]))

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def spaced(self, count: int) -> list[int]:
        """At most `count` layers, evenly from the first to the last."""
        return sorted({1 + place * (self.depth - 1) // max(count - 1, 1) for place in range(count)})

    @property
    def hidden(self) -> int:
        return self.head_weight.shape[1]

    @property
    def head_weight(self) -> Tensor:
        """[vocabulary, hidden]."""
        head = self.model.lm_head
        assert isinstance(head, nn.Linear)
        return head.weight

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., vocabulary] of a stream [..., hidden], through the final norm."""
        assert self.place is not None
        y = self.place[2](x)
        return self.model.get_submodule("lm_head")(y[1] if isinstance(y, tuple) else y)

    def logits(self, tokens: Tensor, visit: Visit | None = None) -> Tensor:
        """Logits [rows, length, vocabulary] of tokens [rows, length]; `visit` sees every layer on the way."""
        with torch.compiler.set_stance("force_eager"):
            if isinstance(self.model, Decoder):
                return self.model(tokens, tap=visit and (lambda w, layer, x: w in STREAM and visit(w, layer, x)))
            handles = [] if visit is None else self.hooks(visit)
            try:
                return self.model(input_ids=tokens, use_cache=False).logits
            finally:
                for handle in handles:
                    handle.remove()

    def hooks(self, visit: Visit) -> list[Any]:
        """Hooks on a model of `transformers` that call `visit`."""

        def first(module: nn.Module, args: tuple, kwargs: dict) -> None:
            visit("embedding", 0, args[0] if args else kwargs["hidden_states"])

        handles: list[Any] = [self.blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
        for layer, block in enumerate(self.blocks, start=1):
            for what, module in zip(("attention", "ffn", "residual"), (*sublayers(block), block), strict=True):

                def hook(module: nn.Module, args: Any, y: Any, what: str = what, layer: int = layer) -> None:
                    visit(what, layer, y[0] if isinstance(y, tuple) else y)

                handles.append(module.register_forward_hook(hook))
        return handles

    def block_functions(self, tokens: Tensor) -> tuple[list[Tensor], list[Callable[[Tensor], Tensor]]]:
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
    def arranged(self, blocks: Sequence[nn.Module]) -> Generator[None]:
        """Let the model consist of `blocks`, in their order, inside the `with`; they keep what they have learned."""
        assert self.place is not None
        stack, name, _ = self.place
        original = getattr(stack, name)
        setattr(stack, name, nn.ModuleList(blocks))
        try:
            yield
        finally:
            setattr(stack, name, original)


STREAM = ("embedding", "attention", "ffn", "residual")


def sublayers(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules of a `transformers` block whose outputs are added to the stream."""
    if hasattr(block, "post_feedforward_layernorm"):  # OLMo2: norms stand behind the sub-layers
        return block.get_submodule("post_attention_layernorm"), block.get_submodule("post_feedforward_layernorm")
    return block.get_submodule("self_attn" if hasattr(block, "self_attn") else "attn"), block.get_submodule("mlp")


def load_hf(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Layered, Any]:
    """A causal language model of `transformers` with its tokenizer, from a folder or by its name on the hub.

    Raises:
        UserError: transformers is not installed, or there is no such model.
    """
    transformers = library(name)
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: not a causal language model of transformers: {str(error).splitlines()[0]}") from error
    return Layered(model, Path(name).name), tokenizer
