"""The LightningModule: one optimizer step per batch, split into micro-batches here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from cod_lightning.config.schema import Config
from cod_lightning.errors import Diverged, UserError
from cod_lightning.evaluate.exact_match import ExactMatch
from cod_lightning.evaluate.perplexity import Perplexity
from cod_lightning.kernels.loss import IGNORE, next_tokens
from cod_lightning.measure.activation_stats import LayerStatistics, first_bad_layer, layer_statistics
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.parallel import parallelise
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.weights import load_weights, shape_mismatches, to_local
from cod_lightning.train.load import InitialWeights
from cod_lightning.train.optim import build_optimizer, frozen, resting_blocks
from cod_lightning.train.strategy import Sharded, backend


class StepModule(LightningModule, ABC):
    """Trains a model with one optimizer step per batch; a child says what the model and its batches are.

    A training batch is a rank's share of one optimizer step; it is cut into micro-batches here, so that the trainer's
    step, the optimizer's update and the data's step are one number.

    Args:
        config: the run, with `model.vocab_size` filled in for a decoder.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.automatic_optimization = False
        self.config, self.optim = config, config.optim
        self.micro_batch_size = config.data.micro_batch_size
        self.initial_weights: InitialWeights | None = None
        """Replace the random initialisation."""
        self.origin: dict[str, Any] | None = None
        """The checkpoint that the initial weights came from, and its step."""
        self.stop_asked = False
        """This process was told to stop."""
        self.stopping = False
        """Some rank was told to: all know it with the same step."""
        self.tokens = 0
        """Tokens read so far that are not padding, over all ranks."""

    @property
    @abstractmethod
    def network(self) -> Any:
        """What is trained: `network(rows, targets)` is a `TokenLoss`."""

    @abstractmethod
    def rows_and_targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The rows of a training batch, and what is to be predicted of each, `IGNORE` where nothing is."""

    @abstractmethod
    def count_tokens(self, rows: Tensor) -> Tensor:
        """How many tokens rows have that are not padding, 0-dimensional."""

    @abstractmethod
    def statistics(self, network: Any, probe: Any) -> LayerStatistics:
        """Every layer of `network`, which is this one's or a copy, measured on the data's `probe_batch`.

        Every rank takes its share of the rows, and all find the statistics of the whole probe.
        """

    @abstractmethod
    def build(self, device: torch.device, wrap: Callable[[Any], None]) -> None:
        """Set the initialised model: built on the meta device, wrapped there, drawn on `device`."""

    def configure_model(self) -> None:
        """Build the model, and shard it where the trainer's strategy does; a second call does nothing.

        Raises:
            UserError: `initial_weights` has other parameters.
        """
        if self.built:
            return
        device = torch.device("cpu")
        settings = self.config.trainer
        wrapping: dict[str, Any] = {"checkpointing": settings.checkpointing, "backend": backend(settings)}
        strategy = self._trainer.strategy if self._trainer is not None else None
        if isinstance(strategy, Sharded):
            wrapping |= strategy.sharding()
            device = strategy.resting_device
        self.build(device, partial(parallelise, **wrapping))
        if self.initial_weights is not None:
            load_weights(self.network, self.initial_weights.weights, self.initial_weights.checkpoint)
            self.origin, self.initial_weights = self.initial_weights.origin, None

    @property
    def built(self) -> bool:
        return any(True for _ in self.parameters())

    def configure_optimizers(self) -> Any:
        optimizer, schedule = build_optimizer(self.network, self.optim, self.config.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One optimizer step over `batch`.

        Returns:
            `loss`, the step's mean over all ranks as it was weighted; `lr`; `tokens`, read so far.

        Raises:
            Diverged: the loss is not finite; the parameters are as they were before this step.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(schedule, LRScheduler)
        step = self.trainer.global_step + 1
        resting = resting_blocks(step - 1, len(self.network.blocks), self.optim, self.config.seed)
        idle = [self.network.blocks[index] for index in resting]
        rows, targets = self.rows_and_targets(batch)
        size = self.micro_batch_size
        micro_batches = list(zip(rows.split(size), targets.split(size), strict=True))
        asked = torch.tensor(int(self.stop_asked), device=rows.device)
        count, tokens, stops = self.sum_over_ranks((targets != IGNORE).sum(), self.count_tokens(rows), asked).tolist()
        self.stopping = stops > 0
        total = torch.zeros((), device=rows.device, dtype=torch.float64)
        strategy = self.trainer.strategy
        optimizer.zero_grad()
        for number, part in enumerate(micro_batches, start=1):
            waiting = number < len(micro_batches) and isinstance(strategy, ParallelStrategy)
            with frozen(idle), strategy.block_backward_sync() if waiting else nullcontext():
                found = self.network(*part)
                if self.optim.weighting == "tokens":
                    loss = found.total / max(count, 1)
                else:
                    loss = found.total / found.counts.sum().clamp(min=1) / len(micro_batches) / self.trainer.world_size
                total += loss.detach()
                # Gradients are averaged over the ranks; the loss is already divided by what all ranks have.
                self.manual_backward(loss * self.trainer.world_size)
        (total,) = self.sum_over_ranks(total)
        value = float(total)
        if not torch.isfinite(total):
            places = (first_bad_layer(self.network, *part) for part in micro_batches)
            bad = next((place for place in places if place), "the loss, or on another rank")
            raise Diverged(
                f"the loss is {value} at step {step}; the first value that is not finite appears in {bad}. "
                "The last checkpoint is kept; lower optim.lr, warm up longer (optim.warmup_ratio) or set optim.clip"
            )
        if self.optim.clip > 0:
            self.clip_gradients(optimizer.optimizer, gradient_clip_val=self.optim.clip, gradient_clip_algorithm="norm")
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        self.tokens += int(tokens)
        return {"loss": total, "lr": lr, "tokens": float(self.tokens)}

    def sum_over_ranks(self, *values: Tensor) -> Tensor:
        stacked = torch.stack(values)
        if self.trainer.world_size == 1:
            return stacked
        # Parameters, and what is found of them, may rest where ranks do not talk.
        return self.trainer.strategy.reduce(stacked.to(self.trainer.strategy.root_device), reduce_op="sum")

    def share(self, rows: Tensor, filler: int) -> Tensor:
        return share(rows, self.trainer.global_rank, self.trainer.world_size, filler)

    def total(self, values: Tensor) -> Tensor:
        return self.sum_over_ranks(values)[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        finite = {name: torch.isfinite(to_local(p)).all() for name, p in self.network.named_parameters()}
        counts = self.sum_over_ranks(*(flag.long() for flag in finite.values())).tolist()
        bad = [name for name, count in zip(finite, counts, strict=True) if count < self.trainer.world_size]
        if bad:
            raise Diverged(
                f"{bad[0]} is not finite after step {self.trainer.global_step}: no checkpoint is written, the last one "
                "is kept; lower optim.lr, warm up longer (optim.warmup_ratio) or set optim.clip"
            )
        checkpoint["tokens"] = self.tokens
        checkpoint["init_from"] = self.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if found := shape_mismatches(self, checkpoint["state_dict"]):
            raise UserError(
                f"the newest checkpoint has {len(found)} parameters of another shape than this run's ({found[0]}): it "
                "is another run's; remove it to go on from an earlier one, or start anew with resume=false"
            )
        self.tokens = checkpoint["tokens"]
        self.origin = checkpoint.get("init_from")


class DecoderModule(StepModule):
    """Trains a decoder on rows of tokens, or of prompts with answers on the answers.

    Args:
        config: the run, with `model.vocab_size` filled in.
        pad_id: padding token, None if rows have none.
        val_rows: number of validation rows over all ranks.
    """

    decoder: Decoder

    def __init__(self, config: Config, *, pad_id: int | None, val_rows: int):
        super().__init__(config)
        self.seq_len, self.pad_id = config.data.seq_len, pad_id
        """A row of instructions has one more number than `seq_len`, the length of its prompt."""
        self.perplexity = Perplexity(val_rows, config.eval.paper_batch, config.eval.paper_ranks)
        self.accuracy = ExactMatch()

    def build(self, device: torch.device, wrap: Callable[[Decoder], None]) -> None:
        specs = build_all(self.config.norm, self.config.model.num_hidden_layers)
        self.decoder = build_decoder(self.config.model, specs, self.config.seed, device, wrap)

    @property
    def network(self) -> Decoder:
        return self.decoder

    def rows_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of stored rows and what they are to predict, which a prompt has no part in: [rows, seq_len]."""
        tokens = batch[:, : self.seq_len]
        return tokens, next_tokens(tokens, self.pad_id, batch[:, self.seq_len] if self.has_prompts(batch) else None)

    def has_prompts(self, batch: Tensor) -> bool:
        return batch.shape[1] > self.seq_len

    def count_tokens(self, rows: Tensor) -> Tensor:
        return (torch.ones_like(rows) if self.pad_id is None else rows != self.pad_id).sum()

    def statistics(self, network: Decoder, probe: Tensor) -> LayerStatistics:
        return layer_statistics(network, self.share(probe, self.pad_id or 0), self.pad_id, sum_over_ranks=self.total)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rows, index = batch
        found = self.decoder(*self.rows_and_targets(rows))
        self.perplexity.update(found.per_sequence, found.counts, index)
        if self.has_prompts(rows):
            self.accuracy.update(found)

    def on_validation_epoch_end(self) -> None:
        figures = self.perplexity.compute()
        if self.accuracy.update_called:
            figures["accuracy"] = 100 * self.accuracy.compute()
        self.perplexity.reset()
        self.accuracy.reset()
        self.log_dict({name: float(value) for name, value in figures.items()}, logger=False)


def share(rows: Tensor, rank: int, world_size: int, filler: int) -> Tensor:
    """A rank's part of rows that all ranks have, or one row of `filler` where there are fewer rows than ranks."""
    part = rows[rank::world_size]
    return part if len(part) else torch.full_like(rows[:1], filler)
