"""LightningDataModules: rows, in the order that (seed, step) decides, for training and for validation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cod_lightning.data.config import DataConfig, problems
from cod_lightning.data.manifest import Manifest, TokenizerRecord
from cod_lightning.data.order import rows_of_step
from cod_lightning.data.prepare import check_against, is_complete, prepare, prepared_folder
from cod_lightning.data.stream import TokenRows, open_set
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer
from cod_lightning.errors import UserError

SCANNED_ROWS = 1024
"""Rows read at a time where validation is cut to fewer tokens than the set has."""


class StepDataModule(LightningDataModule, ABC):
    """What all rows have in common, of tokens or of pixels: steps, ranks, and a fingerprint that a resumed run keeps.

    Build the Trainer with `use_distributed_sampler=False`: the rows of a rank are chosen here, and Lightning stops with
    a TypeError where it is to choose them again. Without a trainer, `rank` and `world_size` say which they are.
    """

    source: str
    """Folder or URL of the rows, after `setup`."""

    def __init__(self, config: DataConfig, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self._rank, self._world_size = rank, world_size
        self._resumed: str | None = None

    @property
    def rank(self) -> int:
        return self._replica()[0]

    @property
    def world_size(self) -> int:
        return self._replica()[1]

    def _replica(self) -> tuple[int, int]:
        """Rank and number among the processes that share the data: fewer than all, with model parallelism."""
        if self.trainer is None:
            return self._rank, self._world_size
        shared = self.trainer.distributed_sampler_kwargs
        return (shared["rank"], shared["num_replicas"]) if shared else (0, 1)

    def share_problems(self) -> list[str]:
        """Return why a batch cannot be shared equally among the ranks, nothing if it can."""
        if self.config.batch_size % self.world_size:
            return [f"data.batch_size={self.config.batch_size} is not divisible by {self.world_size} processes"]
        return []

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the rows and of what they were made with; a resumed run must have the same."""

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the fingerprint of the set that a checkpoint was trained on; None if it does not say.

        Raises:
            UserError: It is not that of this set.
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

    def step_loader(self, rows: Any, rows_of: Callable[[int], np.ndarray]) -> DataLoader:
        """Return one batch for each step that is left; without a trainer, for those of one pass over the rows.

        Raises:
            UserError: The trainer has no `max_steps`.
        """
        trainer = self.trainer
        if trainer is None:
            steps = max(1, len(rows) // self.config.batch_size)
        elif trainer.max_steps < 1:
            raise UserError(f"trainer.max_steps={trainer.max_steps}: must be at least 1, training is counted in steps")
        else:
            steps = trainer.max_steps
        sampler = StepSampler(rows_of, first=lambda: trainer.global_step if trainer else 0, steps=steps)
        return StepLoader(rows, batch_sampler=sampler, **loader_options(self.config.loader_workers))

    def numbered_loader(self, rows: Dataset, count: int, workers: int = 0) -> DataLoader:
        """Return this rank's share of the first `count` rows, `micro_batch_size` at a time.

        Rank r of W has the rows r, r + W, ...; every rank has equally many batches, the missing rows being number -1.
        """
        rank, world_size = self._replica()
        sampler = ValSampler(count, self.config.micro_batch_size, rank=rank, world_size=world_size)
        return DataLoader(rows, batch_sampler=sampler, **loader_options(workers))


def loader_options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        # Not fork: by now there are threads (tokenizers, gloo, CUDA), and their locks would be copied locked.
        "multiprocessing_context": "spawn" if workers else None,
        "pin_memory": torch.cuda.is_available(),
    }


class TokenDataModule(StepDataModule):
    """Batches of token rows.

    Training: int64 [batch_size / world_size, seq_len], one for each optimizer step; splitting it in micro-batches is up
    to the training step. The loader goes from the trainer's global step to `max_steps`, and knows no epochs.

    Validation: (int64 [m, seq_len], int64 [m]) with m = `micro_batch_size`, rows and their numbers in the whole split;
    the row with the number -1 is all pad.

    Attributes, after `setup`: `manifest`, `source` (folder or URL), `train_rows`, `val_rows`.
    """

    manifest: Manifest

    # --- life cycle ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the prepared set, unless there is one or `folder` names one; on one process of each node.

        Raises:
            UserError: As `prepare`.
        """
        if self.config.folder is None:
            prepare(self.config)

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared set and check that it is whole and fits the settings.

        Raises:
            UserError: Bad settings; no prepared set, a damaged one, or one made with other settings; a batch that
                cannot be shared equally among the ranks; another set than that of the checkpoint to resume.
        """
        if found := problems(self.config) + self.share_problems():
            raise UserError("\n".join(found))
        self.source = self.config.folder or str(prepared_folder(self.config))
        self.manifest, self._tokenizer_json = open_set(self.source)
        check_against(self.config, self.manifest, self.source)
        self._check_resumed()
        cache = Path(self.config.root) / "cache"
        self.train_rows = TokenRows(self.source, self.manifest, "train", cache)
        self.val_rows = TokenRows(self.source, self.manifest, "val", cache)
        self._val_count: int | None = None

    # --- what the set says --------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one."""
        return self.manifest.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        """An id that no text yields: as a target it is no token."""
        return self.manifest.tokenizer.pad_id

    @property
    def eos_id(self) -> int:
        return self.manifest.tokenizer.eos_id

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer, layout and rows; a resumed run must have the same."""
        return self.manifest.fingerprint

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the set was made with."""
        return Tokenizer.from_str(self._tokenizer_json)

    # --- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Return the batches of the steps that are left; without a trainer, those of one pass over the rows.

        Raises:
            UserError: The trainer has no `max_steps`.
        """
        rank, world_size = self._replica()
        rows_of = partial(
            rows_of_step,
            seed=self.seed,
            batch_size=self.config.batch_size,
            rank=rank,
            world_size=world_size,
            rows_per_chunk=tuple(chunk.rows for chunk in self.manifest.train.chunks),
        )
        return self.step_loader(self.train_rows, rows_of)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's share of the validation rows, at most `val_tokens` tokens over all ranks."""
        return self.numbered_loader(NumberedRows(self.val_rows, self.pad_id), self.val_count)

    @property
    def val_count(self) -> int:
        """How many validation rows are used: as many of the first as have at most `val_tokens` non-pad tokens."""
        if self._val_count is None:
            self._val_count = _rows_within(self.val_rows, self.config.val_tokens, self.manifest, self.pad_id)
        return self._val_count

    def probe_batch(self, n: int) -> Tensor:
        """Return the tokens of the first `n` validation rows: int64 [n, seq_len].

        Raises:
            UserError: There are fewer.
        """
        if n > len(self.val_rows):
            raise UserError(f"a probe of {n} rows is asked for, but the set has {len(self.val_rows)} validation rows")
        return self.val_rows.read(np.arange(n))[:, : self.manifest.seq_len]


def _rows_within(rows: TokenRows, tokens: int, manifest: Manifest, pad_id: int) -> int:
    if rows.split.tokens <= tokens:
        return len(rows)
    if manifest.layout == "packed":
        return tokens // manifest.seq_len
    used = count = 0
    while count < len(rows):
        block = rows.read(np.arange(count, min(count + SCANNED_ROWS, len(rows))))[:, : manifest.seq_len]
        reached = used + (block != pad_id).sum(1).cumsum(0)
        fitting = int((reached <= tokens).sum())
        count += fitting
        if fitting < len(block):
            break
        used = int(reached[-1])
    return count


def tokenizer_of(config: DataConfig) -> TokenizerRecord | DocumentTokenizer:
    """The tokenizer of the set that `config` names or describes, which may be prepared already or not.

    Raises:
        UserError: As `prepared_folder`, `open_set`, `load_tokenizer`.
    """
    source = config.folder or str(prepared_folder(config))
    if config.folder is not None or is_complete(Path(source)):
        return open_set(source)[0].tokenizer
    return load_tokenizer(config.tokenizer)


class StepSampler(Sampler[list[int]]):
    """`rows_of(step)`, step after step, from `first()` (asked when the iteration begins) to `steps`.

    Its length counts the steps before `first()` too: Lightning numbers a resumed run's batches from where it stopped.
    """

    def __init__(self, rows_of: Callable[[int], np.ndarray], first: Callable[[], int], steps: int) -> None:
        self.rows_of, self.first, self.steps = rows_of, first, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first(), self.steps):
            yield self.rows_of(step).tolist()


class StepLoader(DataLoader):
    """A DataLoader that Lightning takes for resumable: its place is the trainer's step, so it has no state to save."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ValSampler(Sampler[list[int]]):
    """The numbers of one rank's rows, `size` at a time; -1 where other ranks have a row and this one has none."""

    def __init__(self, count: int, size: int, *, rank: int, world_size: int) -> None:
        self.count, self.size, self.rank, self.world_size = count, size, rank, world_size

    def __len__(self) -> int:
        """The same on every rank: what the rank with most rows needs."""
        return -(-self.count // (self.world_size * self.size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            places = range(batch * self.size, (batch + 1) * self.size)
            numbers = (self.rank + self.world_size * place for place in places)
            yield [number if number < self.count else -1 for number in numbers]


class NumberedRows(Dataset):
    """Rows with their numbers; the row with the number -1 is all pad."""

    def __init__(self, rows: TokenRows, pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id

    def __getitems__(self, numbers: list[int]) -> list[tuple[Tensor, int]]:
        index = np.array(numbers)
        rows = torch.full((len(numbers), self.rows.width), self.pad_id)
        rows[torch.from_numpy(index >= 0)] = self.rows.read(index[index >= 0])
        return list(zip(rows, numbers, strict=True))
