"""Coefficients of time: the factor of a step, and what a model goes through without losing it."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import set_step
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.parallel import unwrapped_copy
from cod_lightning.nn.strategies import PRO_RES_SCHEDULES, Schedule, build_all
from operator_calls import OperatorCalls

DEPTH, T = 4, 3
CONFIG = DecoderConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2, vocab_size=37
)
TOKENS = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))


def build(norm="pro_res", **options):
    return build_decoder(CONFIG, build_all({"name": norm, **options}, DEPTH), seed=1)


def factors(decoder):
    residuals = [(block.attention_residual.factor, block.ffn_residual.factor) for block in decoder.blocks]
    assert all(attention.item() == ffn.item() for attention, ffn in residuals)
    return [attention.item() for attention, _ in residuals]


def released(schedule, step):
    """The factors of all layers as in the released code: numpy over the layers."""
    layers = np.arange(1, DEPTH + 1)
    ends = np.linspace(T, T * DEPTH, DEPTH)
    if schedule.startswith("stagewise"):
        first = {"0": 0, "L": 1 / DEPTH, "sqrt_L": np.sqrt(1 / DEPTH), "sqrt_l": 1 / np.sqrt(layers)}[schedule[10:]]
        starts = np.concatenate(([0], ends[:-1]))
        return np.clip(first + (1 - first) * (step - starts) / np.diff(ends, prepend=0), first, 1)
    ends = {"equal": np.full(DEPTH, T * DEPTH), "reverse": np.flip(ends)}.get(schedule, ends)
    return np.clip((step / ends) ** {"sqrt": 0.5, "square": 2}.get(schedule, 1), 0, 1)


@pytest.mark.parametrize("schedule", PRO_RES_SCHEDULES)
def test_pro_res_has_the_factors_of_its_released_code(schedule):
    decoder = build(schedule=schedule, warmup=T)
    for step in range(DEPTH * T + 3):
        set_step(decoder, step)
        assert factors(decoder) == pytest.approx(released(schedule, step), rel=1e-14), step
    assert factors(decoder) == [1.0] * DEPTH


def test_a_schedule_is_one_from_its_end_whatever_its_function_returns():
    schedule = Schedule(lambda step: 0.5, end=3)
    assert [schedule(step) for step in (2, 3, 4)] == [0.5, 1.0, 1.0]


CHANGES = {
    "bfloat16": lambda decoder: decoder.to(torch.bfloat16),
    "meta device": lambda decoder: decoder.to("meta").to_empty(device="cpu"),
    "a copy": copy.deepcopy,
    "an unwrapped copy": unwrapped_copy,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_keeps_its_factors(change):
    decoder = build()
    set_step(decoder, 700)
    changed = CHANGES[change](decoder)
    assert factors(changed) == [700 / (1000 * layer) for layer in range(1, DEPTH + 1)]
    assert changed.step == 700
    assert changed.state_dict().keys() == build("pre_ln").state_dict().keys()


@pytest.mark.filterwarnings("default")  # Dynamo trips over warnings that it provokes itself
def test_a_new_step_needs_no_compilation():
    torch._dynamo.reset()
    eager, compiled, counter = build(), build(), CompileCounterWithBackend("aot_eager")
    for block in compiled.blocks:
        block.compile(backend=counter, fullgraph=True)
    frames = []
    for step in (0, 1, 700, 1000, 5000):
        losses = []
        for decoder in (eager, compiled):
            set_step(decoder, step)
            losses.append(decoder(TOKENS, next_tokens(TOKENS)).total)
        assert torch.equal(*losses), step
        frames.append(counter.frame_count)
    assert frames == [2] * 5  # the first block, whose input is the embedding, and all others


def operations(decoder):
    with OperatorCalls() as operators:
        decoder(TOKENS)
    return operators.calls.total()


def test_only_a_block_with_a_schedule_multiplies_by_its_factor():
    assert operations(build()) == operations(build("pre_ln")) + 2 * DEPTH


def test_the_trained_model_of_a_base_strategy_is_that_of_its_last_step():
    decoder, base = build(base="lns"), build("lns")
    set_step(decoder, 4000)
    assert torch.equal(decoder(TOKENS), base(TOKENS))
