"""The LightningModule: one optimizer step per batch, split into micro-batches here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cod_lightning.config.schema import COUNTS, Config, resumable_settings
from cod_lightning.errors import Diverged, UserError
from cod_lightning.evaluate.exact_match import ExactMatch
from cod_lightning.evaluate.perplexity import Perplexity
from cod_lightning.kernels.loss import IGNORE, next_tokens
from cod_lightning.measure.adapter import Batch
from cod_lightning.measure.training import ProbeStatistics, first_bad_layer, probe_statistics
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder, set_step
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.parallel import parallelise
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import Images
from cod_lightning.nn.weights import load_weights, shape_mismatches, to_local, why_not_dense
from cod_lightning.train.devices import compile_backend, precision, usable_norm_backend
from cod_lightning.train.load import InitialWeights
from cod_lightning.train.optim import build_optimizer, freeze, frozen_blocks, parameter_groups
from cod_lightning.train.strategy import FSDP2Strategy

ADVICE = "Earlier checkpoints are kept; lower optim.lr, warm up longer (optim.warmup_ratio) or set optim.clip"


class StepModule(LightningModule, ABC):
    """Trains a model with one optimizer step per batch; subclasses define the model and its batches.

    A training batch is a rank's share of one optimizer step. `training_step` splits it into micro-batches, so that the
    steps of trainer, optimizer and data have the same number.

    Args:
        config: the run, with `model.vocab_size` filled in for a decoder.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.specs = build_all(config.norm, config.model.num_hidden_layers)
        self.micro_batch_size = config.data.micro_batch_size
        self.pad_id: int | None = None
        """The padding token, None if there is no padding."""
        self.initial_weights: InitialWeights | None = None
        """Weights that replace the random initialisation."""
        self.origin: dict[str, Any] | None = None
        """The entry `init_from` of a checkpoint and a record: path and step of the initial weights."""
        self.stop_signal: int | None = None
        """The last signal that asked this process to stop."""
        self.stop_requested = False
        """Some rank received a stop signal before this step; the same on all ranks."""
        self.tokens = 0
        """Tokens read so far without padding, over all ranks."""

    @property
    @abstractmethod
    def network(self) -> Any:
        """The trained model; `network(inputs, targets)` returns a `TokenLoss`."""

    @abstractmethod
    def inputs_and_targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The inputs of a training batch and their targets; `IGNORE` marks positions without a target."""

    @abstractmethod
    def count_tokens(self, inputs: Tensor) -> Tensor:
        """The number of tokens without padding, []."""

    def model_config(self) -> DecoderConfig:
        """`config.model`, with torch's norms if the Triton kernels are wrong on this device.

        Raises:
            UserError: the kernels are wrong, and norm_backend is `triton`.
        """
        device = torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device
        return replace(self.config.model, norm_backend=usable_norm_backend(self.config, self.specs, device))

    @abstractmethod
    def build(self, device: torch.device, wrap: Callable[[Any], None]) -> None:
        """Build the model on the meta device, apply `wrap`, and initialise it on `device`."""

    def configure_model(self) -> None:
        """Build the model and shard it under FSDP; a second call does nothing.

        Raises:
            UserError: `initial_weights` does not have the model's parameters.
        """
        if list(self.parameters()):  # built already
            return
        device = torch.device("cpu")
        settings = self.config.trainer
        wrapping: dict[str, Any] = {"checkpointing": settings.checkpointing, "backend": compile_backend(settings)}
        strategy = self._trainer.strategy if self._trainer is not None else None
        if isinstance(strategy, FSDP2Strategy):
            wrapping |= strategy.sharding()
            device = strategy.parameter_device
        self.build(device, partial(parallelise, **wrapping))
        if (initial := self.initial_weights) is not None:
            load_weights(self.network, initial.weights, initial.checkpoint)
            self.origin, self.initial_weights = initial.origin, None
        set_step(self.network, 0 if initial is None else initial.step)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = build_optimizer(self.network, self.config.optim, self.config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One optimizer step over `batch`.

        Returns:
            `loss`, the mean of the step over all ranks by `optim.weighting`; `lr`; `tokens` read so far.

        Raises:
            Diverged: the loss or the norm of the gradient is not finite; the parameters are unchanged.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(schedule, LRScheduler)
        step = self.trainer.global_step + 1
        frozen = frozen_blocks(step - 1, len(self.network.blocks), self.config.optim, self.config.seed)
        blocks = [self.network.blocks[index] for index in frozen]
        inputs, targets = self.inputs_and_targets(batch)
        size = self.micro_batch_size
        micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        stop = torch.tensor(int(self.stop_signal is not None), device=inputs.device)
        counts = torch.stack([(targets != IGNORE).sum(), self.count_tokens(inputs), stop])
        count, tokens, stops = self.sum_over_ranks(counts).tolist()
        self.stop_requested = stops > 0
        loss_sum = torch.zeros((), device=inputs.device, dtype=torch.float64)
        strategy = self.trainer.strategy
        optimizer.zero_grad()
        for number, part in enumerate(micro_batches, start=1):
            no_sync = number < len(micro_batches) and isinstance(strategy, ParallelStrategy)
            with freeze(blocks), strategy.block_backward_sync() if no_sync else nullcontext():
                output = self.network(*part)
                if self.config.optim.weighting == "tokens":
                    loss = output.total / max(count, 1)
                else:
                    mean = output.total / output.counts.sum().clamp(min=1)
                    loss = mean / len(micro_batches) / self.trainer.world_size
                loss_sum += loss.detach()
                # The strategy averages gradients over the ranks, but the loss is already divided by the global count.
                self.manual_backward(loss * self.trainer.world_size)
        loss_sum = self.sum_over_ranks(loss_sum)
        norm = gradient_norm(optimizer.optimizer)
        # One wait for the device serves both.
        value, norm_value = torch.stack([loss_sum, norm.to(loss_sum)]).tolist()
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} at step {step}; the first value that is not finite appears in "
                f"{self.first_bad_place(micro_batches)}. {ADVICE}"
            )
        if not math.isfinite(norm_value):
            raise Diverged(
                f"the gradient is not finite at step {step}, first for {self.first_bad_gradient()}. {ADVICE}"
            )
        if self.config.optim.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), self.config.optim.clip, norm)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        set_step(self.network, step)
        self.tokens += int(tokens)
        return {"loss": loss_sum, "lr": lr, "tokens": float(self.tokens)}

    def first_bad_place(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> str:
        """The place of the first value of a forward pass that is not finite."""
        # All micro-batches are searched: under FSDP every rank takes part in every forward.
        layers = [first_bad_layer(self.network, *part) for part in micro_batches]
        return next((layer for layer in layers if layer), "the loss, or on another rank")

    def first_bad_gradient(self) -> str:
        """The parameter whose gradient is the first that is not finite; the backward pass starts at the end."""
        grads = {name: to_local(p.grad) for name, p in self.network.named_parameters() if p.grad is not None}
        names = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
        return names[-1] if names else "a parameter on another rank"

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.trainer.world_size == 1:
            return values
        # With CPU offload, values are on the CPU; reduce on the communication device, a copy, because it is in place.
        return self.trainer.strategy.reduce(values.to(self.trainer.strategy.root_device, copy=True), reduce_op="sum")

    def statistics(self, network: Any, probe: Batch) -> ProbeStatistics:
        """Statistics of every layer on the data's `probe_batch`.

        Each rank processes a share of the probe, which is the same on all; the statistics are summed over the ranks.
        """
        part = probe[self.trainer.global_rank :: self.trainer.world_size]
        if not len(part):  # padding: every rank takes part in the sums
            first = probe[:1]
            if isinstance(first, Images):
                part = Images(first.pixels, torch.full_like(first.labels, IGNORE))
            else:
                part = torch.full_like(first, self.pad_id or 0)
        return probe_statistics(network, part, self.pad_id, sum_over_ranks=self.sum_over_ranks)

    def log_val_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a validation, counts in float64: float32 rounds those above 2**24."""
        for name, value in metrics.items():
            dtype = torch.float64 if name in COUNTS else torch.float32
            self.log(name, torch.tensor(float(value), dtype=dtype, device=self.device), logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        finite = {name: torch.isfinite(to_local(p)).all() for name, p in self.network.named_parameters()}
        counts = self.sum_over_ranks(torch.stack(list(finite.values())).long()).tolist()
        bad = [name for name, count in zip(finite, counts, strict=True) if count < self.trainer.world_size]
        if bad:
            raise Diverged(
                f"{bad[0]} is not finite after step {self.trainer.global_step}: no checkpoint is written. {ADVICE}"
            )
        checkpoint["tokens"] = self.tokens
        checkpoint["init_from"] = self.origin
        checkpoint["precision"] = precision(self.config.trainer)
        checkpoint["settings"] = resumable_settings(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if mismatches := shape_mismatches(self, checkpoint["state_dict"]):
            raise UserError(
                f"the newest checkpoint has {len(mismatches)} parameters of another shape than this run's "
                f"({mismatches[0]}): remove it to resume from an earlier one, or pass resume=false to retrain"
            )
        self.check_groups(checkpoint)
        self.check_moments(checkpoint)
        ours = precision(self.config.trainer)
        if (theirs := checkpoint.get("precision", ours)) != ours:
            raise UserError(
                f"the newest checkpoint was trained in {theirs}, and trainer.precision=auto is {ours} on this machine: "
                "resume on the kind of device that began the run (a CPU: trainer.accelerator=cpu), or retrain with "
                "resume=false"
            )
        self.tokens = checkpoint["tokens"]
        self.origin = checkpoint.get("init_from")
        set_step(self.network, checkpoint["global_step"])

    def check_groups(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that a checkpoint has the optimizer groups of this run.

        Raises:
            UserError: it does not.
        """
        expected = [len(group["params"]) for group in parameter_groups(self.network, self.config.optim)]
        for state in checkpoint.get("optimizer_states", ()):
            if (saved := [len(group["params"]) for group in state["param_groups"]]) != expected:
                raise UserError(
                    f"the newest checkpoint has optimizer groups of {saved} parameters, this version of {expected}: "
                    "finish the run with the version that started it, or pass resume=false to retrain"
                )

    def check_moments(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that a checkpoint has Adam's state, in the shapes of this run: the fused kernel would trust others.

        Raises:
            UserError: it does not.
        """
        groups = parameter_groups(self.network, self.config.optim)
        shapes = dict(enumerate(p.shape for group in groups for p in group["params"]))
        for optimizer in checkpoint.get("optimizer_states", ()):
            problem = "" if optimizer["state"] or not checkpoint["global_step"] else "it is empty"
            for number, state in optimizer["state"].items():
                shape, state = shapes.get(number), state if isinstance(state, Mapping) else {}
                for name, wanted in {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}.items():
                    tensor = state.get(name)
                    is_plain = isinstance(tensor, Tensor) and not why_not_dense(tensor) and tensor.is_floating_point()
                    if not is_plain or tensor.shape != wanted:
                        problem = f"{name} of parameter {number} is missing or has another shape"
            if problem:
                raise UserError(
                    f"the newest checkpoint has no state of this run's optimizer ({problem}): remove it to resume from "
                    "an earlier one, or pass resume=false to retrain"
                )


class DecoderModule(StepModule):
    """Trains a decoder on sequences of tokens; of instructions, on the answers only.

    Args:
        config: the run, with `model.vocab_size` filled in.
        pad_id: padding token, None if there is no padding.
        val_rows: number of validation sequences over all ranks.
    """

    decoder: Decoder

    def __init__(self, config: Config, *, pad_id: int | None, val_rows: int):
        super().__init__(config)
        self.seq_len, self.pad_id = config.data.seq_len, pad_id
        self.perplexity = Perplexity(val_rows, config.eval.paper_batch, config.eval.paper_ranks)
        self.accuracy = ExactMatch()

    def build(self, device: torch.device, wrap: Callable[[Decoder], None]) -> None:
        self.decoder = build_decoder(self.model_config(), self.specs, self.config.seed, device, wrap)

    @property
    def network(self) -> Decoder:
        return self.decoder

    def inputs_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, both [sequences, seq_len]; the tokens of a prompt are no targets.

        Args:
            batch: sequences of `seq_len` tokens; after those of an instruction the length of its prompt.
        """
        tokens = batch[:, : self.seq_len]
        return tokens, next_tokens(tokens, self.pad_id, batch[:, self.seq_len] if self.has_prompts(batch) else None)

    def has_prompts(self, batch: Tensor) -> bool:
        return batch.shape[1] > self.seq_len

    def count_tokens(self, inputs: Tensor) -> Tensor:
        return (torch.ones_like(inputs) if self.pad_id is None else inputs != self.pad_id).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        sequences, index = batch
        output = self.decoder(*self.inputs_and_targets(sequences))
        self.perplexity.update(output.per_sequence, output.counts, index)
        if self.has_prompts(sequences):
            self.accuracy.update(output)

    def on_validation_epoch_end(self) -> None:
        metrics = self.perplexity.compute()
        if self.accuracy.update_called:
            metrics["accuracy"] = 100 * self.accuracy.compute()
        self.perplexity.reset()
        self.accuracy.reset()
        self.log_val_metrics(metrics)


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Norm of the gradient over all ranks, as a tensor, so that the caller decides when to wait for the device.

    The gradient of a group counts `clip` times (`Rates.clip`).
    """
    gradients: dict[float, list[Tensor]] = {}
    for group in optimizer.param_groups:
        own = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        gradients.setdefault(group.get("clip", 1.0), []).extend(own)
    norms = [clip * total_norm(own) for clip, own in gradients.items() if own]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of some gradients over all ranks."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
