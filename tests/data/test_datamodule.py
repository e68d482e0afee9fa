from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _update_dataloader
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch._utils import ExceptionWrapper
from torch.utils.data import Dataset, DistributedSampler

from cod_lightning.data import datamodule
from cod_lightning.data.datamodule import TokenDataModule
from cod_lightning.data.order import sample_indices
from cod_lightning.data.prepare import prepare, prepared_folder
from cod_lightning.errors import UserError


class Recorder(LightningModule):
    """Takes one step per batch, and remembers the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        assert batch_idx == self.trainer.global_step
        self.seen.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        """Lightning warns about a model without one."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_for(folder: Path, steps: int) -> Trainer:
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        limit_val_batches=0,
    )


def test_a_second_setup_does_not_open_the_set_again(packed, open_tokens):
    data = open_tokens(packed)
    opened = data.val_set
    data.setup("validate")
    assert data.val_set is opened


def test_tokenizer_and_probe_come_from_the_set(packed, open_tokens):
    data = open_tokens(packed)
    assert (data.tokenizer.vocab_size, data.tokenizer.pad_id, data.tokenizer.eos_id) == (300, 0, 1)
    assert data.fingerprint == data.manifest.fingerprint
    probe = data.probe_batch(3)
    assert torch.equal(probe, data.val_set.read(np.arange(3)))
    text = data.tokenizer.backend.decode(probe[0].tolist())
    assert data.tokenizer.backend.encode(text).ids == probe[0].tolist()
    with pytest.raises(UserError, match=r"trainer\.probe_rows=999999, but .* validation sequences"):
        data.probe_batch(999_999)


def test_without_a_trainer_training_is_one_epoch_in_order(packed, open_tokens):
    data = open_tokens(packed)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_set) // 8
    indices = sample_indices(3 * 8, 8, seed=1, chunk_sizes=tuple(chunk.rows for chunk in data.manifest.train.chunks))
    assert batches[3].dtype == torch.int64
    assert torch.equal(batches[3], data.train_set.read(indices))


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_are_pinned_for_a_trainer_on_a_gpu_only(packed, open_tokens, monkeypatch, device, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = open_tokens(packed)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(
        strategy=strategy, distributed_sampler_kwargs=None, max_steps=1, accumulate_grad_batches=1, callbacks=[]
    )
    assert data.train_dataloader().pin_memory == data.val_dataloader().pin_memory == pinned


def test_ranks_see_one_global_batch(packed, open_tokens):
    whole = list(open_tokens(packed).train_dataloader())
    shares = [list(open_tokens(packed, rank=rank, world_size=4).train_dataloader()) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch, torch.cat([share[step] for share in shares]))


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(packed, rank, world_size):
    with pytest.raises(UserError, match=rf"rank={rank}, world_size={world_size}: a rank counts from 0 to world_size"):
        TokenDataModule(packed, seed=1, rank=rank, world_size=world_size)


def test_batches_do_not_depend_on_loader_workers(packed, tmp_path, open_tokens):
    config = replace(packed, folder=f"local:{prepared_folder(packed)}", root=str(tmp_path), batch_size=64)
    plain = torch.stack(list(open_tokens(config).train_dataloader()))
    loader = open_tokens(replace(config, loader_workers=2)).train_dataloader()
    assert torch.equal(torch.stack(list(loader)), plain)
    assert torch.equal(torch.stack(list(loader)), plain)  # the workers stay


class Broken(Dataset):
    """Fails as torch lets a dataset fail in a worker: the traceback is the message."""

    def __getitem__(self, index):
        try:
            raise UserError("two\nlines") from OSError("no such file")
        except UserError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_the_error_of_a_loader_worker_is_its_message_alone(packed, open_tokens, loader):
    batches = getattr(open_tokens(packed), loader)()
    with pytest.raises(UserError) as error:
        next(iter(type(batches)(Broken(), batch_sampler=[[0]])))
    assert str(error.value) == "two\nlines"


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_validation_has_every_sequence_once_and_equally_many_batches(request, layout, world_size, open_tokens):
    config = replace(request.getfixturevalue(layout), batch_size=192)
    ranks = [open_tokens(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [list(data.val_dataloader()) for data in ranks]
    assert {len(share) for share in shares} == {len(ranks[0].val_dataloader())}
    sequences, index = (torch.cat(part) for part in zip(*(batch for share in shares for batch in share), strict=True))
    assert all(batch[0].shape == (4, config.seq_len) for share in shares for batch in share)
    filling = index == -1
    assert (
        sequences[filling] == (ranks[0].tokenizer.eos_id if layout == "packed" else ranks[0].tokenizer.pad_id)
    ).all()
    assert torch.equal(index[~filling].sort().values, torch.arange(len(ranks[0].val_set)))
    assert torch.equal(sequences[~filling], ranks[0].val_set.read(index[~filling].numpy()))
    for rank, share in enumerate(shares):
        own = torch.cat([batch[1] for batch in share])
        assert (own[own >= 0] % world_size == rank).all()


@pytest.mark.parametrize("layout", ["packed", "documents"])
@pytest.mark.parametrize("bound", [200, 1000, 10_000_000])
def test_validation_is_limited_to_val_tokens(request, layout, bound, open_tokens):
    config = replace(request.getfixturevalue(layout), val_tokens=bound)
    data = open_tokens(config)
    tokens = (data.val_set.read(np.arange(len(data.val_set))) != data.tokenizer.pad_id).sum(1).cumsum(0)
    assert data.val_count == (tokens <= bound).sum()
    assert sum((index >= 0).sum() for _, index in data.val_dataloader()) == data.val_count


@pytest.mark.parametrize("sequences", [1, 7])
def test_validation_tokens_are_counted_in_blocks(documents, open_tokens, monkeypatch, sequences):
    config = replace(documents, val_tokens=1000)
    expected = open_tokens(config).val_count
    monkeypatch.setattr(datamodule, "COUNTED_SEQUENCES", sequences)
    assert open_tokens(config).val_count == expected > 7


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(packed, tmp_path):
    config = replace(packed, batch_size=512)  # more than an epoch
    whole = Recorder()
    trainer_for(tmp_path, 7).fit(whole, TokenDataModule(config, 1))
    assert len(whole.seen) == 7
    first, second = Recorder(), Recorder()
    trainer = trainer_for(tmp_path, 3)
    trainer.fit(first, TokenDataModule(config, 1))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    trainer_for(tmp_path, 7).fit(
        second, TokenDataModule(config, 1), ckpt_path=tmp_path / "three.ckpt", weights_only=True
    )
    assert len(second.seen) == 4
    assert torch.equal(torch.stack(first.seen + second.seen), torch.stack(whole.seen))


def test_accumulated_batches_are_those_of_as_many_steps(packed, tmp_path):
    class Accumulating(Recorder):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return self.weight * 1.0

    parts = []
    for steps, checkpoint in ((2, None), (4, tmp_path / "two.ckpt")):
        module, trainer = Accumulating(), trainer_for(tmp_path, steps)
        trainer.accumulate_grad_batches = 3
        trainer.fit(module, TokenDataModule(packed, 1), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        parts += module.seen
    plain = Recorder()
    trainer_for(tmp_path, 12).fit(plain, TokenDataModule(packed, 1))
    assert torch.equal(torch.stack(parts), torch.stack(plain.seen))


def test_an_accumulation_by_the_epoch_is_refused(packed, tmp_path):
    """The training repeated batches, and did not end."""
    trainer = trainer_for(tmp_path, 4)
    trainer.callbacks.append(GradientAccumulationScheduler({0: 2}))
    with pytest.raises(UserError, match="GradientAccumulationScheduler counts epochs"):
        trainer.fit(Recorder(), TokenDataModule(packed, 1))


def test_a_checkpoint_of_another_set_is_refused(packed, documents, tmp_path, open_tokens):
    trainer = trainer_for(tmp_path, 1)
    trainer.fit(Recorder(), TokenDataModule(packed, 1))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UserError, match="the checkpoint was trained on a set with fingerprint"):
        trainer_for(tmp_path, 2).fit(Recorder(), TokenDataModule(documents, 1), ckpt_path=tmp_path / "one.ckpt")
    early = TokenDataModule(documents, 1)
    early.load_state_dict(open_tokens(packed).state_dict())
    with pytest.raises(UserError, match="the checkpoint was trained on"):
        early.setup()


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_lightning_cannot_inject_its_sampler(packed, loader, open_tokens):
    data = open_tokens(packed)
    with pytest.raises(TypeError, match=r"can't inject a \(distributed\) sampler"):
        _update_dataloader(getattr(data, loader)(), DistributedSampler(data.train_set, 2, 0))


def test_steps_must_be_bounded(packed, tmp_path):
    with pytest.raises(UserError, match=r"trainer.max_steps=-1"):
        trainer_for(tmp_path, -1).fit(Recorder(), TokenDataModule(packed, 1))


def test_the_set_is_prepared_unless_a_folder_is_given(make_config, packed, tmp_path, open_tokens):
    config = make_config(tmp_path)
    with pytest.raises(UserError, match="is not a prepared set"):
        open_tokens(config)
    data = TokenDataModule(config, 1)
    data.prepare_data()
    data.setup()
    assert data.source == str(prepare(config))
    folder = str(prepared_folder(packed))
    given = TokenDataModule(replace(packed, files=None, folder=folder, root=str(tmp_path / "none")), 1)
    given.prepare_data()
    given.setup("fit")
    assert not (tmp_path / "none").exists()


def test_a_validation_needs_no_batch_that_the_ranks_can_share(packed):
    prepare(packed)
    data = TokenDataModule(packed, 1, world_size=3)
    data.setup("validate")
    assert len(data.val_dataloader())


def test_all_bad_settings_are_reported_together(packed, open_tokens):
    with pytest.raises(UserError, match=r"(?s)data.val_every=1.*data.batch_size=8 is not divisible by 3 processes"):
        open_tokens(replace(packed, val_every=1), world_size=3)
    folder = str(prepared_folder(packed))
    with pytest.raises(UserError, match=r"data.seq_len=64, but the set has 32"):
        open_tokens(replace(packed, folder=folder, seq_len=64))
