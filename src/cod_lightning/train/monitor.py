"""Watch the layers of a model while it trains, in any trainer: variance, gradients and Jacobian of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from cod_lightning.errors import UserError, nearest
from cod_lightning.kernels.loss import IGNORE
from cod_lightning.measure.activation_stats import token_variance
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.batches import as_tokens, checked_tokens, iter_targets, require_pad_id, token_mask
from cod_lightning.measure.open_model import check_layout, find_model, measuring
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn.layouts import Layout, submodule
from cod_lightning.nn.weights import is_sharded
from cod_lightning.train.callbacks import TRAINING_MEASURES
from cod_lightning.train.loggers import layer_scalars

Series = dict[str, list[Any]]
"""Values by layer; a series `layer` holds the numbers of the layers if they are not 1, 2, ...."""


class DepthMonitor(Callback):
    """Measure the layers of a model every `every` steps on a fixed batch, and log one number a layer and measure.

    A callback for Lightning, around any LightningModule that holds a language model; `step` serves any other loop.
    Training is the same to the bit with and without it: random states, training mode, buffers and gradients are
    restored.

    Args:
        probe: token ids, int64 [batch, length], or the encoding that a tokenizer returns, the same at every step;
            held-out text, best 8 to 32 sequences.
        every: steps between measurements.
        measures: "variance" (mean and median over tokens of the variance of the residual stream), "gradient_norm" (of
            each block's parameters), and names of the command `measure`, such as "jacobian", here on eight layers.
        pad_id: padding token, which is not measured; None: there is no padding.
        layout: where the model keeps its blocks and head; None: by the names of its modules.
        module: path of the language model to measure, such as "student", in a module that holds several; its numbers
            are named `student/variance/layer_01` and so on.

    Raises:
        UserError: a measure does not exist, the probe is not a batch of tokens, or another argument has a wrong type or
            is out of range.
    """

    def __init__(
        self,
        probe: Tensor | Mapping[str, Tensor],
        every: int = 100,
        measures: Sequence[str] = ("variance", "gradient_norm", "jacobian"),
        pad_id: int | None = None,
        layout: Layout | None = None,
        module: str = "",
    ):
        require_pad_id(pad_id)
        tokens = as_tokens(probe, "probe")
        if tokens.numel() == 0 or (pad_id is not None and bool((tokens == pad_id).all())):
            raise UserError("probe: it has no tokens but padding")
        if not isinstance(every, Integral) or every < 1:
            raise UserError(f"every={every!r} must be an integer of at least 1")
        if isinstance(measures, str) or not isinstance(measures, Iterable):
            raise UserError(f"measures={measures!r}: expected a list of names, such as ['variance']")
        measures = tuple(measures)
        if unknown := [name for name in measures if name not in MONITORED]:
            raise UserError(f"measures: {unknown[0]!r} is not a measure: {nearest(unknown[0], MONITORED)}")
        self.probe, self.every, self.measures, self.pad_id = probe, every, measures, pad_id
        self.layout, self.module = layout, module

    @cached_property
    def last_steps(self) -> WeakKeyDictionary[nn.Module, int]:
        """The last step of each model, measured or not."""
        return WeakKeyDictionary()

    @cached_property
    def verified(self) -> WeakSet[nn.Module]:
        """The models whose layout is verified."""
        return WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, without the weak references, which it cannot save."""
        return {name: value for name, value in vars(self).items() if name not in ("last_steps", "verified")}

    def step(self, model: nn.Module, step: int) -> dict[str, float]:
        """The measured numbers, such as `variance/layer_01`, if it is time for them, else an empty dictionary.

        Measures at every multiple of `every`, and at the next step if that one was skipped: with several optimizers,
        Lightning's global_step advances by more than one. Models may take turns; each is measured once a step.

        Args:
            model: as for `measure`.
            step: number of optimizer steps so far.
        """
        if not isinstance(model, nn.Module):
            raise UserError(f"model is a {type(model).__name__}: expected an nn.Module")
        last = self.last_steps.get(model, step - 1)
        self.last_steps[model] = step
        started_again = step < last
        is_due = step % self.every == 0 if started_again else step // self.every > last // self.every
        return self.measure(model) if is_due else {}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure now.

        Args:
            model: a language model that `measure` reads, or a module that holds one.

        Returns:
            One number per layer, named `variance/layer_01` or, with `module`, `student/variance/layer_01`.

        Raises:
            UserError: there is no language model, or several and no `module=`; it is sharded by FSDP1; its layout
                cannot be verified; or as `measure.batches.checked_tokens` of the probe.
        """
        inner = submodule(model, self.module, type(model).__name__) if self.module else model
        adapter = find_model(inner, self.layout)
        numbers: dict[str, float] = {}
        with measuring(adapter):
            tokens = checked_tokens(adapter, self.probe, self.pad_id, "probe").to(adapter.device)
            tokens = tokens.clone()  # a tensor of inference_mode takes part in no backward pass
            if adapter.model not in self.verified:
                check_layout(adapter)
                self.verified.add(adapter.model)
            for name in self.measures:
                series = MONITORED[name](adapter, tokens, self.pad_id)
                numbers |= layer_scalars(series, prefix=f"{self.module}/" if self.module else "")
        return numbers

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 0:  # a resumed training has measured its step before it saved the checkpoint
            self.record(trainer, pl_module)
        self.last_steps[pl_module] = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.record(trainer, pl_module)

    def record(self, trainer: Any, pl_module: Any) -> None:
        """Measure if it is time, and give the numbers to the trainer's loggers."""
        if numbers := self.step(pl_module, trainer.global_step):
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)


@torch.no_grad()
def variance(model: ModelAdapter, tokens: Tensor, pad_id: int | None) -> Series:
    """Variance of the residual stream after every block: mean and median over tokens."""
    mask, means, medians = token_mask(model, tokens, pad_id), [], []

    def hook(name: str, layer: int, x: Tensor) -> None:
        if name == "residual":
            values = token_variance(x)[mask]
            means.append(values.mean())
            medians.append(values.quantile(0.5))

    model.run(tokens, hook, mask)
    return {"variance": torch.stack(means).tolist(), "variance_median": torch.stack(medians).tolist()}


def gradient_norm(model: ModelAdapter, tokens: Tensor, pad_id: int | None) -> Series:
    """L2 norm of the gradient of the mean loss with respect to every block's parameters; `.grad` stays as it is.

    Raises:
        UserError: the model does not predict the next token or has no head, its parameters are sharded, no token has a
            next one, or a block is checkpointed with `use_reentrant=True`, which gives gradients to `.grad` alone.
    """
    if reason := model.why_no_loss:
        raise UserError(f"measures: leave out gradient_norm, because {reason}")
    parameters = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    if is_sharded(model.model):
        raise UserError("measures: gradient_norm does not support sharded parameters (FSDP): leave it out")
    [(_, targets)] = iter_targets(model, [tokens], pad_id)
    with torch.enable_grad():
        logits = model.logits(tokens).float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)
        flat = [parameter for block in parameters for parameter in block]
        if not flat:  # all blocks are frozen
            return {"gradient_norm": [0.0] * len(parameters)}
        if not loss.requires_grad or is_in_graph(loss, "CheckpointFunctionBackward"):  # it would be 0
            raise UserError(
                "measures: gradient_norm does not support checkpoints of blocks with use_reentrant=True: leave it out"
            )
        gradients = iter(torch.autograd.grad(loss, flat, materialize_grads=True))
    norms = [torch.stack([next(gradients).float().norm() for _ in block] or [loss * 0]).norm() for block in parameters]
    return {"gradient_norm": torch.stack(norms).tolist()}


def is_in_graph(x: Tensor, operation: str) -> bool:
    """Whether an operation is in the graph of autograd that leads to x."""
    seen: set[Any] = set()
    stack: list[Any] = [x.grad_fn]
    while stack:
        if (node := stack.pop()) is None or node in seen:
            continue
        if node.name() == operation:
            return True
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False


def registered(name: str) -> Callable[[ModelAdapter, Tensor, int | None], Series]:
    """A measure of the registry as a function of a monitor."""

    def measure(model: ModelAdapter, tokens: Tensor, pad_id: int | None) -> Series:
        result = TRAINING_MEASURES[name](model, [tokens], pad_id, None)
        series = MEASURES[name].recorded(result)
        return {column if column == "layer" else f"{name}_{column}": values for column, values in series.items()}

    return measure


MONITORED: dict[str, Callable[[ModelAdapter, Tensor, int | None], Series]] = {
    **{name: registered(name) for name in MEASURES},
    "variance": variance,
    "gradient_norm": gradient_norm,
}
"""The measures of a `DepthMonitor`, by name."""
