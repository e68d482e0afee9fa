import math

import pytest
import torch

from cod_lightning.config.schema import OptimConfig
from cod_lightning.train.optim import build_optimizer, lr_multiplier


def released(update, num, warmup, floor=0.1):
    """The released code's schedule for update 0, 1, ...: linear from 0, then a cosine to the floor at `num`."""
    if update < warmup:
        return update / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (num - warmup)))


@pytest.mark.parametrize(("total", "warmup"), [(20, 2), (20, 0), (100, 10), (7, 6)])
def test_the_cosine_of_the_released_code_is_one_update_late(total, warmup):
    settings = {"warmup": warmup, "total": total, "floor": 0.1}
    strict = [lr_multiplier(k, schedule="cosine", **settings) for k in range(total)]
    paper = [lr_multiplier(k, schedule="cosine_released", **settings) for k in range(total)]
    assert paper == pytest.approx([released(k, total, warmup) for k in range(total)])
    assert strict == pytest.approx([released(k + 1, total, warmup) for k in range(total)])
    assert paper[0] == (0 if warmup else 1)
    assert strict[-1] == pytest.approx(0.1)
    assert max(strict) <= 1
    assert min(strict) > 0
    assert sorted(strict[warmup:], reverse=True) == strict[warmup:]


def test_a_linear_decay_falls_by_the_same_amount_every_update():
    rates = [lr_multiplier(k, warmup=2, total=6, floor=0.2, schedule="linear") for k in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_warmup_starts_at_its_share_of_the_peak_rate():
    """OLMo's 0.1 + 0.9 * step / warmup."""
    rates = [lr_multiplier(k, warmup=4, total=9, floor=0.1, schedule="cosine", start=0.1) for k in range(4)]
    assert rates == pytest.approx([0.325, 0.55, 0.775, 1.0])


@pytest.mark.parametrize(("name", "decoupled"), [("adam", False), ("adamw", True)])
def test_weight_decay_touches_matrices_only(name, decoupled):
    module = torch.nn.Module()
    module.matrix = torch.nn.Parameter(torch.ones(3, 3))
    module.vector = torch.nn.Parameter(torch.ones(3))
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5, warmup_ratio=0.0, min_lr_ratio=1.0)
    optimizer, schedule = build_optimizer(module, config, max_steps=10)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    schedule.step()
    assert torch.equal(module.vector, torch.ones(3))
    assert module.matrix[0, 0].item() == pytest.approx(1 - 0.1 * 0.5 if decoupled else 1 - 0.1, rel=1e-4)


def test_an_optimizer_has_the_betas_and_the_schedule_of_its_configuration():
    schedule_fields = {"schedule": "linear", "warmup_steps": 2, "warmup_start_ratio": 0.5, "min_lr_ratio": 0.25}
    config = OptimConfig(lr=2.0, betas=[0.8, 0.95], **schedule_fields)
    optimizer, schedule = build_optimizer(torch.nn.Linear(1, 1), config, max_steps=4)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.95)] * 2
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.5, 2.0, 1.25, 0.5])


def test_warmup_is_a_share_of_the_steps_or_a_number():
    assert OptimConfig(warmup_ratio=0.1).warmup(250) == 25
    assert OptimConfig(warmup_ratio=0.1, warmup_steps=7).warmup(250) == 7
    assert OptimConfig(warmup_ratio=0.29).warmup(100) == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize(
    ("name", "config", "weight_decay"),
    [
        ("embedding.positions", OptimConfig(weight_decay=0.5), 0.0),
        ("embedding.projection", OptimConfig(weight_decay=0.5), 0.5),
        ("embed_tokens.weight", OptimConfig(weight_decay=0.5), 0.5),
        ("embed_tokens.weight", OptimConfig(weight_decay=0.5, decay_embeddings=False), 0.0),
    ],
)
def test_embeddings_but_not_positions_have_weight_decay_unless_it_is_off(name, config, weight_decay):
    module = torch.nn.Module()
    outer, inner = name.split(".")
    module.add_module(outer, torch.nn.Module())
    module.get_submodule(outer).register_parameter(inner, torch.nn.Parameter(torch.ones(17, 3)))
    optimizer, _ = build_optimizer(module, config, max_steps=10)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay]
