"""Rates by block: LNS trains exactly as Pre-LN with other initial weights and optimizer groups."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from run_files import copy_checkpoints, history
from run_files import losses as recorded

from cod_lightning.config.schema import OptimConfig
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder, build_model
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.train.module import gradient_norm
from cod_lightning.train.optim import build_optimizer, parameter_groups

DEPTH, STEPS, FEW = 4, 200, 20
SHAPE = DecoderConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2, vocab_size=32, init_std=0.1
)
OPTIM = OptimConfig(name="adamw", lr=3e-3, eps=1e-3, weight_decay=1.0)
FORMS = {"lns_as_rates": "input_rates", "lns_as_norm_weights": "norm_rates"}
"""The exact forms of LNS, and the coefficient that has their rates."""


@pytest.fixture
def float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@cache
def losses(norm, steps, clip=0.0, left_out=None, **options):
    """Training losses under a strategy, without one of the multipliers of its rates."""
    specs = build_all({"name": norm, **options}, DEPTH)
    if left_out is not None:
        field = FORMS[norm]
        specs = [spec.replace(**{field: replace(getattr(spec.ffn, field), **{left_out: 1.0})}) for spec in specs]
    decoder = build_decoder(SHAPE, specs, seed=0)
    optimizer, schedule = build_optimizer(decoder, OPTIM, STEPS)
    values, generator = [], torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(SHAPE.vocab_size, (2, 12), generator=generator)
        loss = decoder(tokens, next_tokens(tokens)).total / tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grads_with_norm_(decoder.parameters(), clip, gradient_norm(optimizer))
        optimizer.step()
        schedule.step()
        values.append(loss.item())
    return torch.tensor(values)


@pytest.mark.parametrize("norm", FORMS)
def test_lns_trains_exactly_as_initial_weights_and_rates(norm, float64):
    torch.testing.assert_close(losses(norm, STEPS), losses("lns", STEPS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", FORMS)
@pytest.mark.parametrize("kind", ["derf", "bhyt"])
def test_the_forms_are_exact_with_bounded_functions_too(kind, base, float64):
    torch.testing.assert_close(losses(kind, FEW, base=base), losses(kind, FEW, base="lns"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", FORMS)
def test_clipping_by_the_global_norm_is_exact_too(norm, float64):
    clipped = losses("lns", FEW, clip=0.1)
    assert (clipped - losses("lns", STEPS)[:FEW]).abs().max() > 1e-3
    torch.testing.assert_close(losses(norm, FEW, clip=0.1), clipped, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "multiplier", "clip"),
    [
        *(("lns_as_rates", name, 0.0) for name in ("lr", "eps", "weight_decay")),
        *(("lns_as_norm_weights", name, 0.0) for name in ("lr", "eps")),  # norms have no weight decay
        *((norm, "clip", 0.1) for norm in FORMS),
    ],
)
def test_every_multiplier_is_needed(norm, multiplier, clip, float64):
    without = losses(norm, FEW, clip, left_out=multiplier)
    assert (without - losses("lns", FEW, clip)).abs().max() > 1e-6


def test_a_strategy_without_rates_has_the_two_groups_of_older_checkpoints():
    decoder = build_decoder(SHAPE, build_all({"name": "lns"}, DEPTH), seed=0)
    matrices, vectors = parameter_groups(decoder, OPTIM)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (1.0, 0.0)
    assert matrices.keys() == vectors.keys() == {"params", "lr", "eps", "weight_decay"}
    expected = [p for _, p in decoder.named_parameters() if p.ndim == 2]
    assert all(ours is theirs for ours, theirs in zip(matrices["params"], expected, strict=True))


def rates_by_name(model, config):
    """(lr, eps, weight_decay) of every parameter, divided by those of the configuration."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: tuple(group[key] / getattr(config, key) for key in ("lr", "eps", "weight_decay"))
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }


PLAIN, NO_DECAY = (1.0, 1.0, 1.0), (1.0, 1.0, 0.0)
M = DEPTH / 2
"""Blocks over the base depth of CompleteP."""
EXPECTED = {
    "lns_as_rates": {
        "mlp.up_proj.weight": (0.5, 2.0, 2.0),
        "mlp.down_proj.weight": PLAIN,
        "mlp.up_proj.bias": NO_DECAY,
    },
    "lns_as_norm_weights": {"mlp.up_proj.weight": PLAIN, "input_layernorm.weight": (0.5, 2.0, 0.0)},
    "lns_init_only": {"mlp.up_proj.weight": PLAIN, "input_layernorm.weight": NO_DECAY},
    "lns_rate_only": {"mlp.up_proj.weight": (0.5, 2.0, 2.0), "input_layernorm.weight": NO_DECAY},
    "complete_p": {
        "mlp.down_proj.weight": (1.0, 1 / M, 1.0),
        "self_attn.q_proj.bias": (1.0, 1 / M, 0.0),
        "post_attention_layernorm.weight": (1.0, 1 / M, 0.0),
    },
    "depth_mup": {"mlp.down_proj.weight": (M**-0.5, M**-0.5, 1.0), "mlp.up_proj.bias": (M**-0.5, M**-0.5, 0.0)},
}
"""Rates of parameters of block 4, where 1/sqrt(l) is 1/2."""


@pytest.mark.parametrize("norm", EXPECTED)
def test_the_parameters_of_a_block_have_the_rates_of_their_strategy(norm):
    specs = build_all({"name": norm}, DEPTH)
    vit = build_model(lambda: VisionTransformer(replace(SHAPE, qkv_bias=True), specs, 8, 4, 5), seed=0)
    rates = rates_by_name(vit, OPTIM)
    assert {name: rates[f"layers.3.{name}"] for name in EXPECTED[norm]} == {
        name: pytest.approx(expected) for name, expected in EXPECTED[norm].items()
    }
    assert (rates["embedding.projection.weight"], rates["norm.weight"]) == (PLAIN, NO_DECAY)
    assert rates.keys() == dict(vit.named_parameters()).keys()


def test_every_group_follows_the_schedule_and_keeps_its_name():
    decoder = build_decoder(SHAPE, build_all({"name": "lns_as_rates"}, DEPTH), seed=0)
    optimizer, schedule = build_optimizer(decoder, replace(OPTIM, warmup_steps=4), STEPS)
    assert [group.get("name") for group in optimizer.param_groups] == [
        *(None, None),
        *(f"lr x {g:.6g}, eps x {1 / g:.6g}, weight_decay x {1 / g:.6g}" for g in (2**-0.5, 3**-0.5, 0.5)),
    ]
    expected = [1, 1, 2**-0.5, 3**-0.5, 0.5]
    assert schedule.get_last_lr() == pytest.approx([OPTIM.lr / 4 * factor for factor in expected])


RUN = ("optim=adamw", "optim.eps=1e-4", "optim.clip=0.5", "optim.lisa_layers=1")


def test_a_run_with_clipping_and_lisa_has_the_losses_of_lns(train):
    expected, _ = train(*RUN, "norm=lns")
    record, _ = train(*RUN, "norm=lns_as_rates")
    assert recorded(record) == pytest.approx(recorded(expected), rel=1e-5)
    assert record["history"]["train"]["lr"] == expected["history"]["train"]["lr"]


def test_a_run_with_rates_resumes(train, tmp_path):
    whole, folder = train(*RUN, "norm=lns_as_rates", "name=whole")
    copy_checkpoints(folder, tmp_path / "resumed", until=2)
    resumed, _ = train(*RUN, "norm=lns_as_rates", "name=resumed")
    assert history(resumed) == history(whole)
