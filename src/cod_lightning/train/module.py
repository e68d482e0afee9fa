"""The LightningModule: one optimizer step per batch, split into micro-batches here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from cod_lightning.errors import Diverged
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.layers import first_bad_layer
from cod_lightning.measure.perplexity import Perplexity
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.config import EvalConfig, OptimConfig
from cod_lightning.train.optim import build_optimizer


class DecoderModule(LightningModule):
    """Trains a decoder on rows of tokens.

    A training batch is a rank's share of one optimizer step, [rows, length]; it is cut into micro-batches here, so that
    the trainer's step, the optimizer's update and the data's step are one number.

    Args:
        model: shape of the decoder, with `vocab_size` filled in.
        norm: the strategy's `name` and options.
        optim, evaluation: settings.
        seed: of the initialisation.
        max_steps: length of the schedule.
        micro_batch_size: rows per forward pass.
        pad_id: padding token, None if rows have none.
        val_rows: number of validation rows over all ranks.
    """

    decoder: Decoder

    def __init__(
        self,
        model: DecoderConfig,
        norm: Mapping[str, Any],
        optim: OptimConfig,
        evaluation: EvalConfig,
        *,
        seed: int,
        max_steps: int,
        micro_batch_size: int,
        pad_id: int | None,
        val_rows: int,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model_config, self.norm, self.optim = model, norm, optim
        self.seed, self.max_steps = seed, max_steps
        self.micro_batch_size, self.pad_id = micro_batch_size, pad_id
        self.perplexity = Perplexity(val_rows, evaluation.paper_batch, evaluation.paper_ranks)
        self.tokens = 0
        """Tokens read so far that are not padding, over all ranks."""

    def configure_model(self) -> None:
        if not hasattr(self, "decoder"):
            specs = build_all(self.norm, self.model_config.num_hidden_layers)
            self.decoder = build_decoder(self.model_config, specs, self.seed)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = build_optimizer(self.decoder, self.optim, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """One optimizer step over `batch` [rows of this rank, length].

        Returns:
            `loss`, the step's mean over all ranks as it was weighted; `lr`; `tokens`, read so far.

        Raises:
            Diverged: the loss is not finite; the parameters are as they were before this step.
        """
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(schedule, LRScheduler)
        step = self.trainer.global_step + 1
        micro_batches = batch.split(self.micro_batch_size)
        present = torch.ones_like(batch) if self.pad_id is None else batch != self.pad_id
        targets, tokens = self.sum_over_ranks(present[:, 1:].sum(), present.sum()).tolist()
        total = torch.zeros((), device=batch.device, dtype=torch.float64)
        strategy = self.trainer.strategy
        optimizer.zero_grad()
        for number, rows in enumerate(micro_batches, start=1):
            waiting = number < len(micro_batches) and isinstance(strategy, ParallelStrategy)
            with strategy.block_backward_sync() if waiting else nullcontext():
                found = self.decoder(rows, next_tokens(rows, self.pad_id))
                if self.optim.weighting == "tokens":
                    loss = found.total / max(targets, 1)
                else:
                    loss = found.total / found.counts.sum().clamp(min=1) / len(micro_batches) / self.trainer.world_size
                total += loss.detach()
                # Gradients are averaged over the ranks; the loss is already divided by what all ranks have.
                self.manual_backward(loss * self.trainer.world_size)
        (total,) = self.sum_over_ranks(total)
        value = float(total)
        if not torch.isfinite(total):
            places = (first_bad_layer(self.decoder, rows) for rows in micro_batches)
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
        return self.trainer.strategy.reduce(stacked, reduce_op="sum") if self.trainer.world_size > 1 else stacked

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rows, index = batch
        found = self.decoder(rows, next_tokens(rows, self.pad_id))
        self.perplexity.update(found.rows, found.counts, index)

    def on_validation_epoch_end(self) -> None:
        figures = self.perplexity.compute()
        self.perplexity.reset()
        self.log_dict({name: float(value) for name, value in figures.items()}, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        bad = [name for name, p in self.decoder.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise Diverged(
                f"{bad[0]} is not finite after step {self.trainer.global_step}: no checkpoint is written, the last one "
                "is kept; lower optim.lr, warm up longer (optim.warmup_ratio) or set optim.clip"
            )
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens = checkpoint["tokens"]
