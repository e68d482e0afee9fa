import math

import pytest
import torch
from builders import PAD, VOCABULARY, tokens

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.batches import (
    RunningMean,
    checked_batches,
    error_over_sequences,
    hidden_states,
    iter_batches,
    iter_targets,
    step_counter,
)
from cod_lightning.nn.vit import Images

TOKENS = tokens(3, 5)


def test_the_mean_and_its_standard_error():
    samples, running = torch.randn(50, 3), RunningMean()
    running.add(samples[:20])
    running.add(samples[20:])
    torch.testing.assert_close(running.mean, samples.double().mean(0))
    torch.testing.assert_close(running.error, samples.double().std(0) / 50**0.5)


def test_a_single_sample_has_no_error():
    running = RunningMean()
    running.add(torch.tensor([[3.0, 4.0]]))
    assert running.mean.tolist() == [3, 4]
    assert running.error.isnan().all()


@pytest.mark.parametrize(
    ("sums", "counts", "error"),
    [
        ([2.0, 6.0], [2, 2], 1.0),  # means 1 and 3: standard deviation 2^(1/2), divided by 2^(1/2)
        ([2.0, 0.0, 6.0], [2, 0, 2], 1.0),  # a sequence of padding
        ([1.0, 3.0], [2, 6], 0.0),  # the same mean
        ([2.0], [2], math.nan),
    ],
)
def test_the_error_over_sequences(sums, counts, error):
    result = error_over_sequences(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts))
    assert result == pytest.approx(error, nan_ok=True)


def test_batches_of_padding_are_left_out(causal_lm):
    batches = [torch.full((2, 5), PAD), TOKENS]
    ((batch, keep),) = iter_batches(causal_lm("ours"), batches, PAD)
    assert torch.equal(batch, TOKENS)
    assert keep.all()


def test_padding_is_no_target(causal_lm):
    padded = TOKENS.clone()
    padded[1, 3:] = PAD
    ((_, targets),) = iter_targets(causal_lm("ours"), [padded], PAD)
    assert [(row >= 0).sum().item() for row in targets] == [4, 2, 4]
    assert torch.equal(targets[0, :4], padded[0, 1:])


@torch.no_grad()
def test_hidden_states_are_those_of_the_kept_tokens(causal_lm):
    model, keep = causal_lm("ours"), torch.zeros(3, 5, dtype=torch.bool)
    keep[1, 2] = True
    states = hidden_states(model, TOKENS, keep)
    assert [tuple(x.shape) for x in states] == [(1, 16)] * 5
    torch.testing.assert_close(model.head(states[-1])[0], model.logits(TOKENS)[1, 2])


@pytest.mark.parametrize("total", [1, 3])
def test_steps_are_counted(total):
    calls = []
    advance = step_counter(lambda *call: calls.append(call), total)
    for _ in range(total):
        advance()
    assert calls == [(n + 1, total) for n in range(total)]


@pytest.mark.parametrize("given", [TOKENS, TOKENS.int(), {"input_ids": TOKENS}, [TOKENS.byte()], iter([TOKENS])])
def test_batches_are_read_as_int64_tokens(causal_lm, given):
    (batch,) = checked_batches(causal_lm("ours"), given)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, TOKENS)


def test_what_is_not_read_may_have_the_values_of_tokens_alone(causal_lm):
    padded = TOKENS.clone()
    padded[1, 3:] = PAD
    mask = padded != PAD
    encoding = {
        "attention_mask": mask.long(),
        "token_type_ids": torch.zeros_like(padded),
        "position_ids": (mask.cumsum(1) - 1).masked_fill(~mask, 1),
        "labels": padded.masked_fill(~mask, -100),
        "special_tokens_mask": 1 - mask.long(),
    }
    (batch,) = checked_batches(causal_lm("llama"), {"input_ids": padded, **encoding}, PAD)
    assert torch.equal(batch, padded)


PADDED = torch.tensor([[5, 6, 7], [PAD, 8, 9]])
WRONG = {
    "lists": ([[1, 2], [3, 4]], None, "expected tokens .batch, length., not list: pass tokenizer"),
    "integers": ([1, 2], None, "not int:"),
    "a text": ("text", None, "not str:"),
    "nothing": (None, None, "not NoneType:"),
    "an encoding of labels": ({"labels": TOKENS}, None, "not NoneType:"),
    "one dimension": (TOKENS[0], None, r"not torch.int64 \[5\]"),
    "floats": (TOKENS.float(), None, r"not torch.float32 \[3, 5\]"),
    "a mask": (TOKENS > 5, None, "not torch.bool"),
    "labels": (TOKENS - 100, None, "is negative: pass input_ids, not labels"),
    "another vocabulary": (TOKENS + VOCABULARY, None, "not in the model's vocabulary of 37: another tokenizer"),
    "images": (Images(TOKENS, TOKENS), None, "not Images"),
    "tokens without values": (TOKENS.to("meta"), None, "not tokens on the meta device"),
    "padding first": (PADDED, PAD, "padding must follow the tokens: padding_side='right'"),
    "padding without its token": ({"input_ids": PADDED, "attention_mask": PADDED != PAD}, None, "pass pad_id="),
    "a mask of another shape": (
        {"input_ids": TOKENS, "attention_mask": torch.ones(3, 1, 5, 5)},
        None,
        r"its attention_mask has the shape \[3, 1, 5, 5\], its tokens \[3, 5\]",
    ),
    "a mask of several sequences": (
        {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS).cumsum(1)},
        None,
        "its attention_mask holds other numbers than 0 and 1",
    ),
    "segments": ({"input_ids": TOKENS, "token_type_ids": TOKENS % 2}, None, "its token_type_ids are not read"),
    "positions": (
        {"input_ids": TOKENS, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        None,
        "its position_ids are not read",
    ),
    "embeddings": ({"input_ids": TOKENS, "hook": TOKENS}, None, "its hook is not read: leave it out"),
    "padding of another token": (
        {"input_ids": PADDED, "attention_mask": PADDED != PAD},
        1,
        "hides tokens that are not pad_id=1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_batches_are_refused(causal_lm, case):
    batches, pad_id, message = WRONG[case]
    with pytest.raises(UserError, match=f"^fit: .*{message}"):
        checked_batches(causal_lm("ours"), batches, pad_id, "fit")


@pytest.mark.parametrize("pad_id", ["0", 0.5])
def test_padding_that_is_no_integer_is_refused(causal_lm, pad_id):
    with pytest.raises(UserError, match=f"pad_id={pad_id!r}: expected an integer"):
        checked_batches(causal_lm("ours"), TOKENS, pad_id)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_more_tokens_than_position_embeddings_are_refused(causal_lm, family):
    model = causal_lm(family)
    with pytest.raises(
        UserError, match=f"batches: .* tokens, but the model has embeddings for {model.positions}: trun"
    ):
        checked_batches(model, torch.ones(1, model.positions + 1, dtype=torch.long))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_is_refused(causal_lm):
    model = causal_lm("llama")
    quantised = torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UserError, match="llama: its Linear is quantised: dequantise"):
        checked_batches(ModelAdapter(quantised, "llama"), TOKENS)


def test_a_model_that_sees_all_tokens_may_have_padding_first(causal_lm):
    assert torch.equal(checked_batches(causal_lm("bert"), PADDED, PAD)[0], PADDED)
