"""LNS and a `DepthMonitor` in other people's training code: the same model, batches and optimizer everywhere."""

import csv
import importlib
import pickle
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.measure.training import MONITORED
from tiny_models import tiny_llama

transformers = pytest.importorskip("transformers")

SEQUENCE = torch.arange(12) * 5 % 32
PROBE = torch.arange(24).reshape(2, 12) * 7 % 32
STEPS, LR = 4, 0.1
MEASURES = ("variance", "gradient_norm", "jacobian", "angular")


def build_llama(dropout=0.0):
    torch.manual_seed(0)
    return cod.apply(tiny_llama(attention_dropout=dropout), "lns")


@pytest.fixture(scope="module")
def llama():
    return build_llama()


def monitor(measures=MEASURES):
    return cod.DepthMonitor(probe=PROBE, every=2, measures=measures)


def plain_loop(model, watch=None):
    """Losses of a plain PyTorch loop, and what the monitor measured, by step."""
    model.train()
    torch.manual_seed(1)
    optimizer, losses, measured = torch.optim.SGD(model.parameters(), lr=LR), [], {}
    for step in range(STEPS + 1):
        if watch and (numbers := watch.step(model, step)):
            measured[step] = numbers
        if step == STEPS:
            return losses, measured
        loss = model(input_ids=SEQUENCE[None], labels=SEQUENCE[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())


class Module(pl.LightningModule):
    """A LightningModule that knows nothing of this package."""

    def __init__(self, model):
        super().__init__()
        self.language_model, self.losses = model, []

    def training_step(self, batch, batch_idx):
        loss = self.language_model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def lightning_loop(model, folder, watch):
    module = Module(model.train())
    logger = CSVLogger(folder)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "log_every_n_steps": 1}
    trainer = pl.Trainer(logger=logger, callbacks=[watch], **options, **quiet)
    torch.manual_seed(1)
    trainer.fit(module, DataLoader([SEQUENCE] * STEPS))
    logged = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    return module.losses, {int(row["step"]): float(row["variance/layer_03"]) for row in logged}


class AveragingTrainer(transformers.Trainer):
    """Counts its steps since its last log, as TRL's trainers average their metrics."""

    count = 0

    def training_step(self, *arguments):
        self.count += 1
        return super().training_step(*arguments)

    def log(self, logs, *arguments):
        super().log({**logs, "count": self.count}, *arguments)
        self.count = 0


def hugging_face_loop(model, folder, added, passed, trainer_class=transformers.Trainer):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": SEQUENCE, "labels": SEQUENCE}] * STEPS
    callbacks = [cod.hf.DepthMonitorCallback(probe=PROBE, every=2, measures=[passed])]
    trainer = trainer_class(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.add_callback(cod.hf.DepthMonitorCallback(trainer, probe=PROBE, every=2, measures=[added]))
    torch.manual_seed(1)
    trainer.train()
    return trainer.state.log_history


def test_the_monitor_does_not_change_a_bit_of_the_training():
    watched, bare = build_llama(dropout=0.5), build_llama(dropout=0.5)
    assert plain_loop(watched, monitor())[0] == plain_loop(bare)[0]
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), bare.parameters(), strict=True))


def test_a_longer_probe_does_not_change_the_positions_of_the_training():
    """The base of dynamic rotary embeddings grows with the longest sequence."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    losses = []
    for watch in (cod.DepthMonitor(PROBE.reshape(1, 24), measures=["variance"]), None):
        torch.manual_seed(0)
        losses.append(plain_loop(tiny_llama(max_position_embeddings=8, rope_parameters=rope), watch)[0])
    assert losses[0] == losses[1]


class Router(torch.nn.Module):
    """Counts its tokens, also in evaluation mode, as routers of experts do, and draws random numbers."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.calls, self.fails = experts, 0, False
        self.losses, self.seen, self.by_step = [], set(), {}
        self.register_buffer("tokens", torch.zeros(1))

    def forward(self, x):
        self.tokens += x[..., 0].numel() + torch.rand(1)
        self.calls += 1
        self.losses.append(x.sum())
        self.seen.add(self.calls)
        self.by_step[self.calls] = x
        assert not self.fails
        return self.experts(x)


@pytest.mark.parametrize("fails", [False, True])
def test_a_measurement_leaves_what_the_forward_changes(llama, fails):
    model, watch = deepcopy(llama).train(), monitor(["variance", "gradient_norm"])
    router = model.model.layers[1].mlp = Router(model.model.layers[1].mlp)
    watch.measure(model)
    router.fails, state = fails, torch.get_rng_state()
    with pytest.raises(UserError, match="cannot be run on tokens alone") if fails else nullcontext():
        watch.measure(model)
    assert (router.tokens, router.calls, router.training) == (0, 0, True)
    assert (router.losses, router.seen, router.by_step) == ([], set(), {})
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_of_gradients_do_not_see_the_measurement(llama):
    model, calls = deepcopy(llama), []
    plain = monitor(["gradient_norm"]).measure(model)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.register_hook(lambda gradient: calls.append(1) or 0 * gradient)
    assert monitor(["gradient_norm"]).measure(model) == plain
    assert not calls
    model(input_ids=PROBE, labels=PROBE).loss.backward()
    assert calls
    assert not weight.grad.any()


class Merged(torch.nn.Module):
    """As LoRA layers do, adds to a weight in evaluation mode; its activation is a ScriptModule."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.merged = mlp, False
        self.activation = torch.jit.trace(torch.nn.Identity(), torch.ones(1))
        self.register_buffer("seen", torch.zeros(0))

    def train(self, mode=True):
        if self.merged is mode:
            self.mlp.down_proj.weight.data += -1 if mode else 1
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        self.seen.data = x.detach()
        return self.activation(self.mlp(x))


def test_layers_that_merge_in_evaluation_mode_keep_their_weights(llama):
    model = deepcopy(llama)
    layer = model.model.layers[1].mlp = Merged(model.model.layers[1].mlp)
    weight = layer.mlp.down_proj.weight.clone()
    for _ in range(2):
        monitor(["variance"]).measure(model)
        assert torch.equal(layer.mlp.down_proj.weight, weight)
    assert (layer.merged, layer.training, layer.activation.training, len(layer.seen)) == (False, True, True, 0)


def test_a_jacobian_that_torch_does_not_support_names_the_reason(llama):
    model = deepcopy(llama)
    model.model.layers[1].register_full_backward_hook(lambda *arguments: None)
    with pytest.raises(UserError, match=r"Jacobians do not support this model: .* setup_context"):
        monitor(["jacobian"]).measure(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_gradient_norm_through_reentrant_checkpoints_is_refused(llama):
    """The gradient norm was 0."""
    model = deepcopy(llama)
    for layer, block in enumerate(model.model.layers):
        model.model.layers[layer] = checkpoint_wrapper(block, CheckpointImpl.REENTRANT)
    with pytest.raises(UserError, match="gradient_norm does not support checkpoints of blocks with use_reentrant=True"):
        monitor(["gradient_norm"]).measure(model)


def test_a_gradient_norm_without_a_next_token_is_refused(llama):
    with pytest.raises(UserError, match="no token has a next one"):
        cod.DepthMonitor(PROBE[:, :1], measures=["gradient_norm"]).measure(llama)


def test_a_step_after_one_that_was_left_out_is_measured(llama):
    watch = cod.DepthMonitor(PROBE, every=4, measures=["variance"])
    assert [step for step in (0, 3, 6, 7, 8, 13, 14, 3, 4, 0) if watch.step(llama, step)] == [0, 6, 8, 13, 4, 0]


def test_the_monitor_measures_every_layer(llama):
    measured = plain_loop(deepcopy(llama), monitor())[1]
    assert list(measured) == [0, 2, 4]
    for group in ("variance", "variance_median", "gradient_norm", "jacobian_frobenius"):
        assert [name for name in measured[0] if name.startswith(f"{group}/")] == [
            f"{group}/layer_0{layer}" for layer in (1, 2, 3)
        ]


def test_the_variance_is_that_of_the_hidden_states(llama):
    model = deepcopy(llama).eval()
    states = model.model(PROBE, output_hidden_states=True).hidden_states[1]
    measured = monitor(["variance"]).step(model, 0)
    assert measured["variance/layer_01"] == pytest.approx(states.var(-1).mean().item())
    assert measured["variance_median/layer_01"] == pytest.approx(states.var(-1).quantile(0.5).item())


def build_bert():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, **shape)).eval()


def test_the_variance_of_bert_does_not_depend_on_padding():
    model, tokens = build_bert(), PROBE[:, :9].clamp(min=1)
    padded = torch.nn.functional.pad(tokens, (0, 3))
    measured, expected = (
        cod.DepthMonitor(probe, measures=["variance"], pad_id=0).measure(model) for probe in (padded, tokens)
    )
    assert measured == pytest.approx(expected, rel=1e-5)


def test_the_gradient_norm_of_bert_is_refused():
    with pytest.raises(UserError, match="leave out gradient_norm, because bert does not predict the next token"):
        monitor(["gradient_norm"]).measure(build_bert())


def test_the_probe_can_be_what_a_tokenizer_returns(llama):
    watch = cod.DepthMonitor({"input_ids": PROBE.int()}, measures=["gradient_norm"])
    assert watch.measure(llama) == monitor(["gradient_norm"]).measure(llama)


def test_the_gradient_norm_is_that_of_a_backward_pass(llama):
    model = deepcopy(llama).eval()
    measured = monitor(["gradient_norm"]).step(model, 0)
    model(input_ids=PROBE, labels=PROBE).loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.model.layers[1].parameters()]).norm()
    assert measured["gradient_norm/layer_02"] == pytest.approx(norm.item())


@pytest.mark.parametrize("name", ["gradient_norm", "angular"])
def test_a_measure_does_not_depend_on_padding(llama, name):
    tokens = PROBE[:, :9].clamp(min=1)
    padded = torch.nn.functional.pad(tokens, (0, 3))
    measured, expected = (
        cod.DepthMonitor(probe, measures=[name], pad_id=0).measure(llama) for probe in (padded, tokens)
    )
    assert measured == pytest.approx(expected, rel=1e-5)


def test_a_lightning_module_trains_the_same_and_logs_the_monitor(llama, tmp_path):
    losses, measured = plain_loop(deepcopy(llama), monitor())
    lightning_losses, logged = lightning_loop(deepcopy(llama), tmp_path, monitor())
    assert lightning_losses == pytest.approx(losses)
    assert logged == pytest.approx({step: numbers["variance/layer_03"] for step, numbers in measured.items()})


def test_the_hugging_face_trainer_trains_the_same_and_logs_the_monitor(llama, tmp_path):
    pytest.importorskip("accelerate")
    losses, measured = plain_loop(deepcopy(llama), monitor())
    history = hugging_face_loop(deepcopy(llama), tmp_path, added="variance", passed="gradient_norm")
    assert [row["loss"] for row in history if "loss" in row] == pytest.approx(losses, abs=2e-4)  # logged rounded
    for name in ("variance/layer_03", "gradient_norm/layer_03"):
        logged = {row["step"]: row[name] for row in history if name in row}
        assert logged == pytest.approx({step: numbers[name] for step, numbers in measured.items()})


def test_the_monitor_leaves_the_metrics_of_a_derived_trainer_alone(llama, tmp_path):
    pytest.importorskip("accelerate")
    history = hugging_face_loop(deepcopy(llama), tmp_path, "variance", "gradient_norm", AveragingTrainer)
    assert [row["count"] for row in history if "loss" in row] == [1] * STEPS


def test_a_resumed_training_does_not_measure_its_first_step_again(llama):
    callback = cod.hf.DepthMonitorCallback(probe=PROBE, every=2, measures=["variance"])
    for step, logged in ((0, [0]), (2, [])):
        state = transformers.TrainerState(global_step=step)
        callback.on_train_begin(None, state, None, model=llama)
        assert [row["step"] for row in state.log_history] == logged


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch")
def test_a_resumed_accumulation_does_not_measure_its_first_step_again(llama, tmp_path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    measured = []
    for steps, resumed in ((2, None), (4, tmp_path / "last.ckpt")):
        trainer = pl.Trainer(
            logger=CSVLogger(tmp_path, version=steps),
            callbacks=[monitor(["variance"])],
            max_steps=steps,
            **options,
            **quiet,
        )
        trainer.fit(Module(deepcopy(llama).train()), DataLoader([SEQUENCE] * 8), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        logged = csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines())
        measured.append([int(row["step"]) for row in logged])
    assert measured == [[0, 2], [4]]


def test_a_trainer_without_a_logger_is_warned_that_the_numbers_are_lost(llama):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        logger=False, callbacks=[monitor(["variance"])], accelerator="cpu", devices=1, max_steps=1, **quiet
    )
    with pytest.warns(UserWarning, match="DepthMonitor: the Trainer has no logger, so its numbers are lost"):
        trainer.fit(Module(deepcopy(llama).train()), DataLoader([SEQUENCE]))


def test_without_transformers_the_callback_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cod_lightning.hf", raising=False)
    with pytest.raises(UserError, match=r"cod_lightning.hf needs transformers: pip install 'cod_lightning\[hf\]'"):
        importlib.import_module("cod_lightning.hf")


def test_the_measures_may_be_a_generator():
    assert cod.DepthMonitor(PROBE, measures=(name for name in MEASURES)).measures == MEASURES


def test_a_compiled_model_is_monitored(llama):
    compiled = torch.compile(deepcopy(llama), backend="eager")
    assert monitor(["variance"]).step(compiled, 0) == monitor(["variance"]).step(llama, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_monitor_compiles_no_blocks(llama):
    """torch compiles a function of blocks eight times, and runs further blocks without compilation."""
    counts = []
    for watch in (monitor(["variance"]), None):
        torch.compiler.reset()
        model, counter = deepcopy(llama), CompileCounter()
        for block in model.model.layers:
            block.compile(backend=counter)
        plain_loop(model, watch)
        counts.append(counter.frame_count)
    assert counts == [3, 3]


def with_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)  # the Trainer of another test has set the precision of this process
    wrapped = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    reset(reset_partial_state=True)
    return wrapped


def with_fabric(model):
    return Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(model)


@pytest.mark.parametrize("wrap", [with_accelerate, with_fabric, torch.nn.DataParallel])
def test_a_model_in_mixed_precision_is_measured_in_that_of_its_weights(llama, wrap):
    wrapped = wrap(deepcopy(llama))
    measures = ["variance", "gradient_norm", "jacobian"]
    assert monitor(measures).measure(wrapped) == monitor(measures).measure(llama)
    assert cod.measure.variance(wrapped, PROBE).series() == cod.measure.variance(llama, PROBE).series()


@pytest.mark.parametrize("name", ["gradient_norm", "jacobian", "gain", "jacobian_map", "theory"])
def test_a_gradient_of_a_sharded_model_is_refused(llama, shard, name):
    """A Jacobian of one ended the process with SIGSEGV."""
    model = deepcopy(llama)
    sharded = shard(model, model.model.layers)
    with pytest.raises(UserError, match="support sharded parameters"):
        monitor([name]).measure(sharded)


def test_a_model_sharded_by_fsdp2_is_measured_again(llama, shard):
    """Between two forward passes its parameters are whole, as those of FSDP1 seem."""
    model = deepcopy(llama)
    shard(model, [])
    first, second = (monitor(["variance"]).measure(model) for _ in range(2))
    assert first == second == monitor(["variance"]).measure(llama)


@pytest.mark.parametrize("reshard", [True, False, None])
def test_a_measurement_before_the_optimizer_leaves_parameters_sharded(llama, shard, reshard):
    """The next step computed with weights from before the optimizer."""
    losses = []
    for watch in (monitor(["variance"]), None):
        model = deepcopy(llama)
        shard(model, model.model.layers, reshard_after_forward=reshard)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for _ in range(2):
            loss = model(input_ids=SEQUENCE[None], labels=SEQUENCE[None]).loss
            loss.backward()
            if watch:
                watch.measure(model)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="new in torch 2.13")
@pytest.mark.parametrize("reshard", [True, False, None])
def test_a_measurement_that_fails_leaves_parameters_sharded(llama, shard, reshard):
    model = deepcopy(llama)
    model.model.layers[1].mlp = Router(model.model.layers[1].mlp)
    shard(model, model.model.layers, reshard_after_forward=reshard)
    model.model.layers[1].mlp.fails = True
    with pytest.raises(UserError, match="it cannot be run on tokens alone"):
        monitor(["variance"]).measure(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_a_gradient_of_a_sharded_model_is_refused_between_two_passes(llama, shard):
    model = deepcopy(llama)
    shard(model, model.model.layers, reshard_after_forward=False)
    with torch.no_grad():
        model(PROBE)
    for name in ("gradient_norm", "jacobian"):
        with pytest.raises(UserError, match="support sharded parameters"):
            monitor([name]).measure(model)


def with_fsdp1(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


one_rank = pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")


@one_rank
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("measure", ["gradient_norm", "jacobian", "variance"])
def test_a_model_sharded_by_fsdp1_is_refused(llama, shard, measure, use_orig_params):
    """Gradient norms were 0, and a Jacobian ended the process with SIGSEGV."""
    policy = ModuleWrapPolicy({type(llama.model.layers[0])})
    wrapped = with_fsdp1(deepcopy(llama), auto_wrap_policy=policy, use_orig_params=use_orig_params)
    for model in (wrapped, wrapped.module, Module(wrapped)):
        with pytest.raises(UserError, match=r"sharded by FSDP1 .* shard it by FSDP2"):
            monitor([measure]).measure(model)


@one_rank
def test_applying_to_a_model_sharded_by_fsdp1_is_refused(shard):
    """The error advised a Layout, with which a norm has no values on some ranks."""
    wrapped = with_fsdp1(tiny_llama())
    with pytest.raises(UserError, match=r"sharded by FSDP1 .* pass the model before it is wrapped"):
        cod.apply(wrapped.module, "lns")


def test_models_that_take_turns_are_each_measured(llama):
    stock, watch = tiny_llama(), monitor(["variance"])
    for step in (0, 1, 2):
        numbers = [watch.step(model, step) for model in (llama, stock)]
        expected = [monitor(["variance"]).step(model, step) for model in (llama, stock)]
        assert numbers == expected


def test_the_layout_of_every_model_is_proved(llama):
    watch = monitor(["variance"])
    watch.step(llama, 0)
    other = tiny_llama()
    other.model.layers[1].register_forward_hook(lambda block, args, y: 2 * y)
    with pytest.raises(UserError, match="block 2 adds something else"):
        watch.step(other, 0)


def test_a_used_monitor_can_be_pickled(llama):
    watch = monitor(["variance"])
    numbers = watch.step(llama, 0)
    assert pickle.loads(pickle.dumps(watch)).step(llama, 0) == numbers


class Distillation(torch.nn.Module):
    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student


def test_one_of_several_language_models_is_chosen_by_its_path(llama):
    model = Distillation(tiny_llama(depth=2).requires_grad_(False), llama)
    with pytest.raises(UserError, match=r"several language models, teacher, student: .* module='student'"):
        monitor(["variance"]).step(model, 0)
    chosen = cod.DepthMonitor(PROBE, measures=["variance"], module="student").step(model, 0)
    assert chosen == {f"student/{name}": value for name, value in monitor(["variance"]).step(llama, 0).items()}
    with pytest.raises(UserError, match="Distillation has no module 'studnt'"):
        cod.DepthMonitor(PROBE, module="studnt").step(model, 0)


def test_a_model_that_is_held_twice_is_one(llama):
    assert monitor(["variance"]).measure(Distillation(llama, torch.nn.Sequential(llama)))


@pytest.mark.parametrize("outside", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_around_a_measurement_do_not_change_it(llama, outside):
    with outside():
        measured, result = monitor().step(llama, 0), cod.measure.variance(llama, PROBE)
    assert measured == monitor().step(llama, 0)
    assert result == cod.measure.variance(llama, PROBE)


def test_a_probe_of_inference_mode_is_measured(llama):
    with torch.inference_mode():
        probe = PROBE.clone()
    assert cod.DepthMonitor(probe, measures=["gradient_norm"]).measure(llama) == monitor(["gradient_norm"]).measure(
        llama
    )


PAIRS = {1, 2}
"""The first layers of neighbouring pairs."""
LAYERS = {name: {1, 2, 3} for name in MONITORED} | {"causal": PAIRS, "swaps": PAIRS, "theory": {1, 2, 3, 4}}
"""The measured layers by measure; the theory predicts the input of the final norm as well."""


@pytest.mark.parametrize("name", sorted(MONITORED))
def test_every_measure_can_be_monitored(llama, name):
    numbers = monitor([name]).step(llama, 0)
    assert {int(key.rpartition("_")[2]) for key in numbers} == LAYERS[name]


@pytest.mark.parametrize("name", sorted(MONITORED))
def test_a_default_device_does_not_change_a_measurement(llama, name):
    with torch.device("meta"):
        measured = monitor([name]).measure(llama)
    assert str(measured) == str(monitor([name]).measure(llama))


WRONG = {
    "another vocabulary": (lambda: cod.DepthMonitor(PROBE + 20), "token 51 is not in the model's vocabulary of 32"),
    "an unknown measure": (lambda: cod.DepthMonitor(PROBE, measures=["varianc"]), "variance"),
    "a period of zero": (lambda: cod.DepthMonitor(PROBE, every=0), "every=0 must be an integer of at least 1"),
    "a period of text": (lambda: cod.DepthMonitor(PROBE, every="10"), "every='10' must be an integer"),
    "a period of a truth": (lambda: cod.DepthMonitor(PROBE, every=True), "every=True must be an integer"),
    "an empty list of measures": (lambda: cod.DepthMonitor(PROBE, measures=[]), "measures is empty: name at least one"),
    "segments": (
        lambda: cod.DepthMonitor({"input_ids": PROBE, "token_type_ids": torch.ones_like(PROBE)}),
        "probe: its token_type_ids are not read",
    ),
    "a period of a fraction": (lambda: cod.DepthMonitor(PROBE, every=2.5), r"every=2\.5 must be an integer"),
    "a measure as text": (lambda: cod.DepthMonitor(PROBE, measures="variance"), "measures='variance': expected a list"),
    "no measures": (lambda: cod.DepthMonitor(PROBE, measures=None), "measures=None: expected a list"),
    "padding of text": (lambda: cod.DepthMonitor(PROBE, pad_id="0"), "pad_id='0': expected an integer"),
    "a probe of numbers": (lambda: cod.DepthMonitor(PROBE.float()), "expected tokens"),
    "a probe of labels": (lambda: cod.DepthMonitor(PROBE - 100), "token -[0-9]+ is negative: pass input_ids"),
    "an empty probe": (lambda: cod.DepthMonitor(PROBE[:, :0]), "no tokens but padding"),
    "padding first": (lambda: cod.DepthMonitor(PROBE, pad_id=0), "padding must follow the tokens"),
    "a probe of padding": (lambda: cod.DepthMonitor(torch.ones_like(PROBE), pad_id=1), "no tokens but padding"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_monitor_is_an_error(llama, case):
    build, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        build().step(llama, 0)


def test_frozen_blocks_have_gradients_of_zero(llama):
    model = deepcopy(llama)
    model.model.layers.requires_grad_(False)
    numbers = cod.DepthMonitor(PROBE, measures=["gradient_norm"]).step(model, 0)
    assert set(numbers.values()) == {0.0}


def test_a_model_without_known_blocks_is_an_error():
    with pytest.raises(UserError, match="Linear has an unknown layout"):
        monitor().step(torch.nn.Linear(2, 2), 0)
