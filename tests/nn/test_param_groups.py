"""`param_groups`: a stock model that trains as under `apply`."""

import tempfile

import lightning.pytorch as pl
import pytest
import torch
from stock_models import (
    OUTER,
    PLAIN,
    Outer,
    PlainModel,
    build,
    changed,
    decoder_of,
    gated_llama,
    pruned,
    scaled_llama,
    sharing,
    trained_llama,
)
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import cod_lightning as cod
from cod_lightning.errors import UserError

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(160).reshape(20, 8) * 7 % 60
SETTINGS = {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.5}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def train(model, groups, optimizer_class=torch.optim.AdamW, scheduler_of=lambda optimizer, groups: None):
    """Losses of 20 steps."""
    optimizer, losses = optimizer_class(groups), []
    scheduler = scheduler_of(optimizer, groups)
    for tokens in TOKENS:
        loss = cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def build_double(family="Llama"):
    return build(family, **(NO_DROPOUT if family == "GPT2" else {})).double()


def train_applied(family="Llama"):
    """Losses of LNS by `apply`, with the usual groups."""
    model = build_double(family)
    groups = cod.param_groups(model, "pre_ln", initial_weights="scaled", **SETTINGS)
    return train(cod.apply(model, "lns"), groups)


@pytest.mark.parametrize("form", ["matrices", "norm_weights"])
def test_a_stock_model_trains_as_under_a_negative_gain(form, monkeypatch):
    monkeypatch.setitem(cod.STRATEGIES, "flipped", lambda layer, depth: cod.block(gain=-(layer**-0.5)))
    stock, applied = build_double(), build_double()
    groups = cod.param_groups(stock, "flipped", form=form, initial_weights="scale", **SETTINGS)
    usual = cod.param_groups(applied, "pre_ln", initial_weights="scaled", **SETTINGS)
    expected = train(cod.apply(applied, "flipped"), usual)
    torch.testing.assert_close(train(stock, groups), expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_trains_matrices_as_under_gains(monkeypatch):
    """A power of two, because Muon multiplies in bfloat16."""
    monkeypatch.setitem(cod.STRATEGIES, "halving", lambda layer, depth: cod.block(gain=2.0 ** (1 - layer)))
    settings, losses = {"lr": 3e-2, "weight_decay": 0.5}, {}
    for norm, model in {"halving": build_double(), "pre_ln": build_double()}.items():
        groups = cod.param_groups(model, norm, initial_weights="scale", **settings)
        if norm == "pre_ln":
            cod.apply(model, "halving")
        matrices = {parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2}
        groups = [{**group, "params": [p for p in group["params"] if p in matrices]} for group in groups]
        losses[norm] = train(model, [group for group in groups if group["params"]], torch.optim.Muon)
    assert losses["pre_ln"][-1] < losses["pre_ln"][0] - 0.1
    torch.testing.assert_close(losses["halving"], losses["pre_ln"], rtol=0, atol=1e-12)


def test_a_gain_of_zero_has_no_group(monkeypatch):
    monkeypatch.setitem(cod.STRATEGIES, "silent", lambda layer, depth: cod.block(gain=0.0))
    with pytest.raises(UserError, match=r"sets gain=0\.0, which no optimizer group replaces: use apply"):
        cod.param_groups(build("Llama"), "silent", initial_weights="scale", **SETTINGS)


def test_the_usual_groups_leave_a_model_to_apply():
    model = build("Llama")
    cod.param_groups(model, "pre_ln", initial_weights="scale", **SETTINGS)
    cod.apply(model, "lns")


@pytest.mark.parametrize(
    ("family", "form", "tolerance"),
    [
        ("Llama", "matrices", 1e-12),
        ("Llama", "norm_weights", 1e-12),
        ("GPT2", "matrices", 1e-12),
        ("GPT2", "norm_weights", 1e-12),
        ("Gemma", "norm_weights", 1e-5),  # transformers multiplies by 1 + weight in float32
    ],
)
def test_a_stock_model_trains_as_under_lns(family, form, tolerance):
    stock = build_double(family)
    groups = cod.param_groups(stock, "lns", form=form, initial_weights="scale", **SETTINGS)
    torch.testing.assert_close(train(stock, groups), train_applied(family), rtol=0, atol=tolerance)


SCHEDULERS = {
    "LambdaLR": lambda optimizer, groups: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "OneCycleLR": lambda optimizer, groups: lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in groups], total_steps=len(TOKENS)
    ),
    "CosineAnnealingLR": lambda optimizer, groups: lr_scheduler.CosineAnnealingLR(optimizer, len(TOKENS), eta_min=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_that_multiplies_every_rate_keeps_the_equality(scheduler):
    stock, applied = build_double(), build_double()
    groups = cod.param_groups(stock, "lns", initial_weights="scale", **SETTINGS)
    usual = cod.param_groups(applied, "pre_ln", initial_weights="scaled", **SETTINGS)
    expected = train(cod.apply(applied, "lns"), usual, scheduler_of=SCHEDULERS[scheduler])
    assert not torch.allclose(expected, train_applied(), rtol=0, atol=1e-6)
    torch.testing.assert_close(train(stock, groups, scheduler_of=SCHEDULERS[scheduler]), expected, rtol=0, atol=1e-12)


class LanguageModel(pl.LightningModule):
    """The recipe of the guide: "scale" once, "scaled" whenever a fit begins."""

    def __init__(self, model):
        super().__init__()
        self.model, self.losses = model, []
        cod.param_groups(model, "lns", initial_weights="scale", **SETTINGS)

    def training_step(self, tokens, batch_idx):
        loss = cross_entropy(self.model(tokens[None]).logits[0, :-1], tokens[1:])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(cod.param_groups(self.model, "lns", initial_weights="scaled", **SETTINGS))


def test_a_lightning_module_trains_as_under_lns_in_every_fit(tmp_path):
    module, applied = LanguageModel(build_double().train()), build_double()
    usual = cod.param_groups(applied, "pre_ln", initial_weights="scaled", **SETTINGS)
    cod.apply(applied, "lns")
    expected = []
    for _ in range(2):
        options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
        trainer = pl.Trainer(**options, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, torch.utils.data.DataLoader(TOKENS, batch_size=None))
        expected.append(train(applied, usual))
    measured = torch.tensor(module.losses, dtype=torch.float64)
    torch.testing.assert_close(measured, torch.cat(expected), rtol=0, atol=1e-12)


def test_a_checkpoint_of_the_stock_model_resumes_as_under_lns(tmp_path):
    model = build_double()
    cod.param_groups(model, "lns", initial_weights="scale", **SETTINGS)
    model.save_pretrained(tmp_path)
    assert "cod_lightning" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    groups = cod.param_groups(loaded, "lns", initial_weights="scaled", **SETTINGS)
    torch.testing.assert_close(train(loaded, groups), train_applied(), rtol=0, atol=1e-12)


def test_a_folded_model_continues_training_as_under_lns():
    folded = cod.fold(cod.apply(build_double(), "lns"))
    groups = cod.param_groups(folded, "lns", form="norm_weights", initial_weights="scaled", **SETTINGS)
    torch.testing.assert_close(train(folded, groups), train_applied(), rtol=0, atol=1e-12)


def test_initial_weights_scaled_before_are_left_alone():
    model = build("Llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cod.param_groups(model, "lns", initial_weights="scaled", **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def loaded_llama():
    """Scaled, saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        scaled_llama().save_pretrained(folder)
        return transformers.LlamaForCausalLM.from_pretrained(folder)


REFUSED = {
    "a trained model": (
        trained_llama,
        {},
        "initial_weights='scale' is .*: its norms are not at",
    ),
    "scaling twice": (scaled_llama, {}, "initial_weights='scale' .*: param_groups was called before: pass"),
    "scaling again after loading": (loaded_llama, {}, "initial_weights='scale' .*: param_groups was called before"),
    "norms without weights": (
        lambda: build("Olmo"),
        {},
        "initial_weights='scale' .*: its norms .* no parameter 'weight'",
    ),
    "no decision on initial weights": (lambda: build("Llama"), {"initial_weights": None}, "initial_weights=None"),
    "an unknown form": (lambda: build("Llama"), {"form": "norms"}, "form='norms'"),
    "an applied strategy": (lambda: cod.apply(build("Llama"), "lns"), {}, "not both"),
    "a strategy applied inside": (Outer, {"layout": OUTER}, "already: module 'core', which has .*, not both"),
    "a decoder with a strategy": (lambda: decoder_of("lns"), {}, "the decoder was built with a strategy"),
    "scaled branches": (lambda: build("Llama"), {"norm": "complete_p"}, "sets branch_scale=0.66"),
    "another placement": (lambda: build("Llama"), {"norm": "post_ln"}, "pre_norm=False, sum_norm=True"),
    "another reader of a norm": (gated_llama, {"initial_weights": "scaled"}, "layout.inputs is missing"),
    "no inputs in the layout": (PlainModel, {"layout": PLAIN}, "layout.inputs is missing"),
    "a rate that is text": (lambda: build("Llama"), {"lr": "1e-3"}, "lr='1e-3' must be a finite number"),
    "no rate": (lambda: build("Llama"), {"lr": None}, "lr=None must be a finite number"),
    "a decay that is text": (lambda: build("Llama"), {"weight_decay": "0.1"}, "weight_decay='0.1' must be"),
    "a negative eps": (lambda: build("Llama"), {"eps": -1.0}, "eps=-1.0 must be a finite number of at least 0"),
    "a rate that is NaN": (lambda: build("Llama"), {"lr": float("nan")}, "lr=nan must be"),
    "pruned weights": (
        lambda: changed(build("Llama"), pruned("mlp.up_proj")),
        {"initial_weights": "scaled"},
        "layer 2, ffn: no rates for a weight: Linear has no parameter 'weight'",
    ),
    "shared weights": (
        lambda: changed(build("Llama"), sharing("self_attn.q_proj")),
        {"initial_weights": "scaled"},
        "layer 2, attention: it shares a weight with a layer of other rates",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_exact_groups_is_refused_and_unchanged(case):
    build_model, changes, message = REFUSED[case]
    model = build_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        cod.param_groups(model, **({"norm": "lns", "initial_weights": "scale", **SETTINGS} | changes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_a_sharded_model_are_not_scaled(shard):
    model = build("Llama")
    with pytest.raises(UserError, match=r"is sharded.*do so before fully_shard"):
        cod.param_groups(shard(model, model.model.layers), "lns", initial_weights="scale", **SETTINGS)


def test_the_initial_weights_are_required():
    with pytest.raises(TypeError, match="initial_weights"):
        cod.param_groups(build("Llama"), "lns", lr=1e-3)
