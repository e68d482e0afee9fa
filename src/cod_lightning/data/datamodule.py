"""LightningDataModules: batches in the order that (seed, step) determines, for training and for validation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cod_lightning import signals
from cod_lightning.data.config import DataConfig, data_errors
from cod_lightning.data.manifest import Manifest
from cod_lightning.data.order import sample_indices
from cod_lightning.data.prepare import check_against, is_complete, prepare, prepared_folder
from cod_lightning.data.stream import TokenDataset, open_set
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer
from cod_lightning.errors import UserError

COUNTED_SEQUENCES = 1024
"""Sequences to read at a time while counting validation tokens."""


class StepDataModule(LightningDataModule, ABC):
    """Batches by step and rank, of tokens or of images, with a fingerprint that a resumed run must match.

    The training loader has one batch of `batch_size / world_size` samples for each optimizer step, from the trainer's
    global step to `max_steps`; the training step splits it into micro-batches. A trainer with `accumulate_grad_batches`
    reads that many batches in each step instead. There are no epochs.

    Build the Trainer with `use_distributed_sampler=False`, because the samples of a rank are selected here; Lightning
    raises a TypeError otherwise. Without a trainer, `rank` and `world_size` apply.

    Attributes, after `setup`: `source` (folder or URL), `fingerprint` (SHA-256 of the data), `train_set`, `val_set`.
    """

    source: str
    fingerprint: str
    train_set: Any
    val_set: Any

    def __init__(self, config: DataConfig, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"rank={rank}, world_size={world_size}: a rank counts from 0 to world_size - 1")
        super().__init__()
        self.config = config
        self.seed = seed
        self._rank, self._world_size = rank, world_size
        self._resumed: str | None = None

    @abstractmethod
    def setting_errors(self) -> list[str]:
        """Return one error for each invalid setting."""

    @abstractmethod
    def open(self) -> None:
        """Set the attributes of the class."""

    def setup(self, stage: str | None = None) -> None:
        """Open the data, once; check that it matches the settings.

        Raises:
            UserError: bad settings, or data that is missing, damaged or does not match them; a batch that the ranks
                cannot share equally; another set than that of the checkpoint to resume.
        """
        errors, world_size = self.setting_errors(), self.replica[1]
        if stage != "validate" and self.config.batch_size % world_size:  # a validation has no steps
            errors.append(f"data.batch_size={self.config.batch_size} is not divisible by {world_size} processes")
        if errors:
            raise UserError("\n".join(errors))
        if not hasattr(self, "source"):  # Lightning calls again, and to count tokens or list images takes a while
            self.open()
        self._check_resumed()

    @property
    @abstractmethod
    def val_count(self) -> int:
        """Number of leading validation samples to use."""

    @abstractmethod
    def sample_keys(self, first: int, count: int) -> np.ndarray:
        """Return the keys in `train_set` of `count` samples; they are numbered over all epochs: [count, ...]."""

    @property
    def replica(self) -> tuple[int, int]:
        """Rank and number of the processes that share the data; model parallelism makes them fewer than all."""
        if self.trainer is None:
            return self._rank, self._world_size
        shared = self.trainer.distributed_sampler_kwargs
        return (shared["rank"], shared["num_replicas"]) if shared else (0, 1)

    def batch_keys(self, step: int) -> np.ndarray:
        """Return the keys of this rank's training samples of one step: [batch_size / world_size, ...]."""
        rank, world_size = self.replica
        count = self.config.batch_size // world_size
        return self.sample_keys(step * self.config.batch_size + rank * count, count)

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the fingerprint of a checkpoint, which may be None.

        Raises:
            UserError: this set has another one.
        """
        self._resumed = state_dict["fingerprint"]
        if hasattr(self, "source"):
            self._check_resumed()

    def _check_resumed(self) -> None:
        if self._resumed is not None and self._resumed != self.fingerprint:
            raise UserError(
                f"the checkpoint was trained on a set with fingerprint {self._resumed[:16]}..., but {self.source} has "
                f"{self.fingerprint[:16]}...: resume with the same data and settings"
            )

    def train_dataloader(self) -> DataLoader:
        """Return the batches of the remaining steps; without a trainer, those of one epoch.

        Raises:
            UserError: the trainer has no `max_steps`, or changes the accumulation with the epoch.
        """
        trainer: Any = self.trainer
        per_step = 1
        if trainer is not None and any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):
            raise UserError(
                "GradientAccumulationScheduler counts epochs, and training is counted in steps: remove it, and pass "
                "Trainer(accumulate_grad_batches=N)"
            )
        if trainer is None:
            steps = max(1, len(self.train_set) // self.config.batch_size)
        elif trainer.max_steps < 1:
            raise UserError(f"trainer.max_steps={trainer.max_steps}: must be at least 1, training is counted in steps")
        else:
            steps, per_step = trainer.max_steps, trainer.accumulate_grad_batches
        sampler = StepSampler(
            self.batch_keys, first=lambda: trainer.global_step * per_step if trainer else 0, count=steps * per_step
        )
        return StepLoader(self.train_set, batch_sampler=sampler, **self._loader_options(self.config.loader_workers))

    def _val_loader(self, dataset: Dataset, workers: int) -> DataLoader:
        """Return this rank's share of the first `val_count` samples, `micro_batch_size` at a time.

        Rank r of W has the samples r, r + W, ...; the index -1 fills up, so that all ranks have equally many batches.
        """
        rank, world_size = self.replica
        size = self.config.micro_batch_size
        batches = -(-self.val_count // (world_size * size))
        indices = range(rank, batches * size * world_size, world_size)
        indices = [index if index < self.val_count else -1 for index in indices]
        sampler = [indices[start : start + size] for start in range(0, len(indices), size)]
        return PlainErrorLoader(dataset, batch_sampler=sampler, **self._loader_options(workers))

    def _loader_options(self, workers: int) -> dict[str, Any]:
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            # Not fork: by now threads exist (tokenizers, gloo, CUDA), whose locks would be copied while locked.
            "multiprocessing_context": "spawn" if workers else None,
            "worker_init_fn": start_loader_worker,
            # Pinning starts CUDA, which a run on the CPU does not need.
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }


def start_loader_worker(number: int) -> None:
    """Leave signals to the process that trains: it needs its workers to finish the step."""
    signals.ignore_once()


class StepSampler(Sampler[list[int]]):
    """Yields `batch_keys(number)` of the batches from `first()`, called when the iteration begins, to `count`.

    A step has one batch, or as many as the trainer accumulates. The length includes the batches before `first()`:
    Lightning numbers those of a resumed run from there.
    """

    def __init__(self, batch_keys: Callable[[int], np.ndarray], first: Callable[[], int], count: int) -> None:
        self.batch_keys, self.first, self.count = batch_keys, first, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.first(), self.count):
            yield self.batch_keys(number).tolist()


class PlainErrorLoader(DataLoader):
    """A DataLoader that raises the UserError of a worker, which torch raises with the traceback as its message."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except UserError as error:
            message = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
            raise UserError(message.rstrip()) from error


class StepLoader(PlainErrorLoader):
    """A DataLoader that Lightning considers resumable; its position is the trainer's step, so its state is empty."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class IndexedSequences(Dataset):
    """Sequences with their indices; the sequence with the index -1 is all `filler`."""

    def __init__(self, dataset: TokenDataset, filler: int) -> None:
        self.dataset, self.filler = dataset, filler

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        index = np.array(indices)
        sequences = torch.full((len(indices), self.dataset.width), self.filler)
        sequences[torch.from_numpy(index >= 0)] = self.dataset.read(index[index >= 0])
        return list(zip(sequences, indices, strict=True))


class TokenDataModule(StepDataModule):
    """Batches of token sequences of a prepared set.

    Training: int64 [batch_size / world_size, width], see `Manifest.row_width`.

    Validation: (int64 [m, width], int64 [m]) with m = `micro_batch_size`, sequences and their indices in the whole
    split; the sequence with the index -1 is all pad, or all EOS in a packed set, whose model may have no pad.

    Attributes, after `setup`: `manifest`, `tokenizer`, whose pad the loss ignores, and those of `StepDataModule`.
    """

    manifest: Manifest
    tokenizer: DocumentTokenizer
    train_set: TokenDataset
    val_set: TokenDataset

    def prepare_data(self) -> None:
        """Prepare the set unless it exists or `folder` names one; Lightning calls this on one process per node."""
        if self.config.folder is None:
            prepare(self.config)

    def setting_errors(self) -> list[str]:
        return data_errors(self.config)

    def open(self) -> None:
        source, cache = self.config.folder or str(prepared_folder(self.config)), Path(self.config.root) / "cache"
        self.manifest, self.tokenizer = open_set(source)
        check_against(self.config, self.manifest, source)
        self.train_set = TokenDataset(source, self.manifest, "train", cache)
        self.val_set = TokenDataset(source, self.manifest, "val", cache)
        self.fingerprint, self.source = self.manifest.fingerprint, source

    def sample_keys(self, first: int, count: int) -> np.ndarray:
        """Return sequence indices: int64 [count]."""
        return sample_indices(first, count, seed=self.seed, chunk_sizes=self.train_set.chunk_sizes)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's share of the validation sequences, at most `val_tokens` tokens over all ranks."""
        filler = self.tokenizer.eos_id if self.manifest.layout == "packed" else self.tokenizer.pad_id
        return self._val_loader(IndexedSequences(self.val_set, filler), workers=0)

    @cached_property
    def val_count(self) -> int:
        """Number of leading validation sequences that have at most `val_tokens` non-pad tokens."""
        limit, seq_len = self.config.val_tokens, self.manifest.seq_len
        if self.val_set.split.tokens <= limit:
            return len(self.val_set)
        if self.manifest.layout == "packed":
            return limit // seq_len
        count = used = 0
        for indices in torch.arange(len(self.val_set)).split(COUNTED_SEQUENCES):
            block = self.val_set.read(indices.numpy())[:, :seq_len]
            totals = used + (block != self.tokenizer.pad_id).sum(1).cumsum(0)
            count += int((totals <= limit).sum())
            used = int(totals[-1])
            if used > limit:  # the rest of a large split need not be read
                break
        return count

    def probe_batch(self, n: int) -> Tensor:
        """Return the tokens of the first `n` validation sequences: int64 [n, seq_len].

        Raises:
            UserError: there are fewer.
        """
        if n > len(self.val_set):
            raise UserError(
                f"trainer.probe_rows={n}, but {self.source} has {len(self.val_set)} validation sequences: lower "
                "trainer.probe_rows, or hold out more text (data.val_every, data.val_files)"
            )
        return self.val_set.read(np.arange(n))[:, : self.manifest.seq_len]


def tokenizer_of(config: DataConfig) -> DocumentTokenizer:
    """Return the tokenizer of the set that `config` names or describes; the set need not be prepared.

    Raises:
        UserError: the set or the tokenizer cannot be read.
    """
    source = config.folder or str(prepared_folder(config))
    if config.folder is not None or is_complete(Path(source)):
        return open_set(source)[1]
    return load_tokenizer(config.tokenizer)
