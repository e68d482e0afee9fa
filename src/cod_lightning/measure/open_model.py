"""Open a model to measure it: find it inside a module, prove its layout, and run it as it is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cod_lightning.errors import UserError, first_line
from cod_lightning.measure.adapter import ModelAdapter, family
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.layouts import Layout, find_sites, hidden_output, zero_output
from cod_lightning.nn.model_files import find_source, require_tokenizer
from cod_lightning.nn.pretrained import load_checkpoint
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.nn.weights import refuse_fsdp1
from cod_lightning.rng import isolate_rng


def load_pretrained(
    name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[ModelAdapter, Any]:
    """Load a causal language model of `transformers` and its tokenizer.

    Args:
        name: a folder with config.json and weights, a .gguf file or a folder with one, the short name of a packaged
            model, or a name on the hub.
        dtype: dtype of the weights, a floating-point one.
        device: device of the model.

    Returns:
        The model, ready for `cod.measure`, and its tokenizer.

    Raises:
        UserError: there is no such model, or it cannot be loaded whole, has an unknown layout, or does not run as its
            layout says; or `dtype` is not a floating-point dtype of torch.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype={dtype!r} is not a floating-point dtype of torch: pass one, such as torch.bfloat16")
    require_tokenizer(find_source(str(name)))
    checkpoint = load_checkpoint(name, dtype)
    tokenizer = checkpoint.tokenizer()
    model = ModelAdapter(checkpoint.model.to(device), Path(name).name, tokenizer.decode)
    check_layout(model)
    return model, tokenizer


def find_model(module: Any, layout: Layout | None = None) -> ModelAdapter:
    """The language model that a module is, wraps or holds.

    Args:
        module: a model, or a module around it.
        layout: where the model keeps its blocks; None: by the names of its modules.

    Raises:
        UserError: the module is not an `nn.Module`, is sharded by FSDP1, has virtual tokens of `peft`, or holds several
            language models or none whose layout is known.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"model is a {type(module).__name__}: expected an nn.Module")
    refuse_fsdp1(module)
    for part in module.modules():
        if getattr(getattr(part, "active_peft_config", None), "is_prompt_learning", False):
            raise UserError(
                f"{type(part).__name__} has virtual tokens, which are not measured: pass its get_base_model() to "
                "measure it without them"
            )
    found: dict[str, ModelAdapter] = {}
    for path, candidate in module.named_modules():
        if isinstance(candidate, nn.ModuleDict) or any(path.startswith(f"{outer}.") for outer in found):
            continue  # a ModuleDict cannot be run
        try:
            adapter = ModelAdapter(candidate, type(candidate).__name__, layout=layout)
        except UserError:
            continue
        if adapter.layout.blocks.partition(".")[0] not in candidate._modules:
            continue  # a wrapper that only forwards attributes, and may autocast, as Fabric's
        if not path:
            return adapter
        found[path] = adapter
    if len(found) > 1:
        raise UserError(
            f"{type(module).__name__} holds several language models, {', '.join(found)}: pass one of them, to a "
            f"DepthMonitor its path, such as module={min(found)!r}"
        )
    if found:
        return found.popitem()[1]
    return ModelAdapter(module, type(module).__name__, layout=layout)  # raises, naming the module


MAX_RESTORED = 2**22
"""Most elements of a buffer that `measuring` restores; larger ones hold quantised weights or caches."""
CONTAINERS = (list, dict, set, deque)
"""Types of attributes whose entries `measuring` restores."""
OF_TORCH = vars(nn.Module()).keys()
"""Attributes of every module."""


@contextmanager
def measuring(model: ModelAdapter) -> Generator[None]:
    """Evaluation mode inside the `with`, without autocast and inference mode.

    It compiles nothing, because torch limits how often a function is compiled. Afterwards, also after an error, the
    random states and the model are as before: its modes, the attributes that its forward sets, what it adds to lists,
    dictionaries and sets of its own, and the buffers that it changes, such as counts of tokens or the frequencies for a
    length, unless they have more than `MAX_RESTORED` numbers. FSDP2 is left sharded, because an optimizer changes the
    shards.

    Raises:
        UserError: the model is on the meta device.
    """
    if model.device.type == "meta":
        raise UserError(f"{model.name} is on the meta device: initialise or load the weights first")
    modules = list(model.model.modules())
    modes = [(module, module.training) for module in modules]  # of ScriptModules too, which have no other attributes
    python_modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(own, dict(own)) for module in python_modules for own in (vars(module), module._buffers)]
    own_values = [value for module in python_modules for name, value in vars(module).items() if name not in OF_TORCH]
    containers = [(value, value.copy()) for value in own_values if type(value) in CONTAINERS]
    kept = [b for b in model.model.buffers() if b.layout == torch.strided and b.numel() <= MAX_RESTORED]
    values = [(buffer, buffer.clone()) for buffer in kept if not buffer.is_meta]
    for module in modules:  # not by `eval`, in which LoRA layers merge their weights
        module.training = False
    try:
        with (
            isolate_rng(),
            torch.inference_mode(False),
            torch.autocast(model.device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    except BaseException:
        for module in modules:  # FSDP2 is still in its forward pass, where `reshard` does nothing
            if isinstance(module, FSDPModule) and hasattr(module, "reset_iter_state"):  # new in torch 2.13
                with suppress(RuntimeError):  # a part of a larger sharded model, which resets it
                    module.reset_iter_state()
        raise
    finally:
        for module, mode in modes:
            module.training = mode
            if isinstance(module, FSDPModule):
                module.reshard()
        for own, before in attributes:
            for name in own.keys() - before.keys():
                del own[name]
            own.update(before)
        for container, before in containers:
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(before)
        with torch.no_grad():
            for buffer, before in values:
                if buffer.shape != before.shape:
                    buffer.data = before
                elif not torch.equal(buffer, before):
                    buffer.copy_(before)


@torch.no_grad()
def check_layout(model: ModelAdapter) -> None:
    """Run a model that is not ours on a few tokens to prove that its blocks, sub-layers and head are what they seem.

    The model is in evaluation mode. Our own models need no proof.

    Raises:
        UserError: the model cannot be run; an FFN runs before its attention, as if a layout swaps them; the embedding
            and what attention and FFN add are not the residual stream; the head does not give the logits of the last
            layer; or a block, run alone, does not repeat its output.
    """
    if isinstance(model.model, Decoder | VisionTransformer):
        return
    try:
        problem = layout_problem(model)
    except Exception as error:  # models of unknown families raise many kinds
        problem = f"it cannot be run on tokens alone: {first_line(error)}"
    if problem:
        raise UserError(f"{model.name}: {family(model.model)} cannot be measured: {problem}")


def layout_problem(model: ModelAdapter) -> str:
    """Why a model cannot be measured, or an empty string; see `check_layout`."""
    vocabulary = 6 if model.known_weight is None else len(model.known_weight)
    tokens = torch.arange(1, 6, device=model.device)[None] % vocabulary
    seen: list[tuple[str, int]] = []
    activations: dict[tuple[str, int], Tensor] = {}

    def hook(name: str, layer: int, x: Tensor) -> None:
        seen.append((name, layer))
        activations[name, layer] = x.clone()  # the block may add to it in place

    logits = model.output(tokens, hook)
    if not isinstance(logits, Tensor):
        return f"its first output is {type(logits).__name__}, expected logits"
    if logits.isnan().any():
        return "its logits are NaN"
    inputs, functions = model.block_functions(tokens)
    if len(seen) != len(set(seen)) or len(activations) != 1 + 3 * model.depth:
        return "it does not run every block once"
    if inputs[0].shape[:2] != tokens.shape:
        return f"its blocks take hidden states {list(inputs[0].shape)}, expected [batch, length, hidden]"
    if layer := swapped_layer(model, seen, inputs, functions):
        first, second = model.layout.sublayers
        return (
            f"block {layer} runs {second!r} before {first!r}, whose output depends on it: name attention first and the "
            "feed-forward network second in each pair of its Layout"
        )
    x = activations["embedding", 0]
    for site in find_sites(model.model, model.layout):
        if site.part == "attention" and differs(inputs[site.layer - 1], x):
            return f"the residual stream changes before block {site.layer}"
        x = x + activations[site.part, site.layer]
        x = x if site.sum_norm is None else site.sum_norm(x)
        if site.part == "ffn":
            y = activations["residual", site.layer]
            if differs(x, y):
                return f"block {site.layer} adds something else than its attention and FFN to the residual stream"
            if differs(functions[site.layer - 1](inputs[site.layer - 1]), y):
                return f"block {site.layer}, run alone, does not repeat its output"
            x = y
    if model.why_no_head:
        return ""  # no measure reads its output
    expected = model.head(x)
    if logits.shape[1:2] == (1,):  # as nanoGPT gives those of the last token only
        expected = expected[:, -1:]
    return "its final norm and head do not give its logits" if differs(expected, logits) else ""


def swapped_layer(
    model: ModelAdapter,
    seen: Sequence[tuple[str, int]],
    inputs: Sequence[Tensor],
    functions: Sequence[Callable[[Tensor], Tensor]],
) -> int:
    """The first layer whose FFN, by the layout, runs before its attention and changes it; 0 if there is none.

    Sub-layers that run in parallel may be called in either order.

    Args:
        model: with the layout.
        seen: names and layers of the activations, in the order of the forward pass.
        inputs: of the blocks.
        functions: the blocks.
    """
    place = {key: number for number, key in enumerate(seen)}
    sites = find_sites(model.model, model.layout)
    for attention, ffn in zip(sites[::2], sites[1::2], strict=True):
        layer = attention.layer
        if place["attention", layer] < place["ffn", layer]:
            continue
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, y: Any, outputs: list[Tensor] = outputs) -> None:
            outputs.append(hidden_output(y))

        with attention.branch.register_forward_hook(keep):
            functions[layer - 1](inputs[layer - 1])
            with ffn.branch.register_forward_hook(zero_output):
                functions[layer - 1](inputs[layer - 1])
        if differs(*outputs):
            return layer
    return 0


def differs(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors [..., hidden] differ at a token by more than rounding; NaN does not count."""
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    return x.shape != y.shape or bool(((x - y).norm(dim=-1) > tolerance * y.norm(dim=-1)).any())
