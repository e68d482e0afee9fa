"""Watch the layers of a model while it trains, in any trainer: variance, gradients and Jacobian of every block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from cod_lightning.errors import UserError, nearest
from cod_lightning.measure.batches import as_tokens, check_encoding, checked_tokens, require_pad_id
from cod_lightning.measure.open_model import check_layout, find_model, measuring
from cod_lightning.measure.training import MONITORED
from cod_lightning.nn.layouts import Layout, submodule
from cod_lightning.train.loggers import layer_scalars


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
            each block's parameters), and names of the command `measure`, such as "jacobian", here on eight layers, with
            two iterations, at one token of each of the first four sequences.
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
        check_encoding(probe, tokens, pad_id, "probe")
        if tokens.numel() == 0 or (pad_id is not None and bool((tokens == pad_id).all())):
            raise UserError("probe: it has no tokens but padding")
        if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
            raise UserError(f"every={every!r} must be an integer of at least 1")
        if isinstance(measures, str) or not isinstance(measures, Iterable):
            raise UserError(f"measures={measures!r}: expected a list of names, such as ['variance']")
        measures = tuple(measures)
        if not measures:
            raise UserError("measures is empty: name at least one, such as 'variance'")
        if unknown := [name for name in measures if name not in MONITORED]:
            raise UserError(f"measures: {unknown[0]!r} is not a measure: {nearest(unknown[0], MONITORED)}")
        self.probe, self.every, self.measures, self.pad_id = probe, every, measures, pad_id
        self.layout, self.module = layout, module

    @cached_property
    def last_steps(self) -> WeakKeyDictionary[nn.Module, int]:
        """The last step of each model, measured or not."""
        return WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, without the weak references, which it cannot save."""
        return {name: value for name, value in vars(self).items() if name != "last_steps"}

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
                cannot be verified; or the probe does not fit its vocabulary or positions.
        """
        inner = submodule(model, self.module, type(model).__name__) if self.module else model
        adapter = find_model(inner, self.layout)
        numbers: dict[str, float] = {}
        with measuring(adapter):
            tokens = checked_tokens(adapter, self.probe, self.pad_id, "probe").to(adapter.device)
            tokens = tokens.clone()  # a tensor of inference_mode takes part in no backward pass
            check_layout(adapter)  # at every measurement: zero weights at the start hide what a layout lacks
            for name in self.measures:
                series = MONITORED[name](adapter, tokens, self.pad_id)
                numbers |= layer_scalars(series, prefix=f"{self.module}/" if self.module else "")
        return numbers

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.loggers:
            rank_zero_warn("DepthMonitor: the Trainer has no logger, so its numbers are lost: set logger=True")
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
