"""The linear cross-entropy against the reference with all logits, and against a sum in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_lightning.kernels import loss as module
from cod_lightning.kernels.loss import IGNORE, linear_cross_entropy, next_tokens, reference_linear_cross_entropy
from operator_calls import OperatorCalls


def by_hand(logits, tokens, pad_id):
    loss, count = torch.zeros(len(tokens), dtype=torch.float64), torch.zeros(len(tokens), dtype=torch.int64)
    for row in range(len(tokens)):
        for position in range(tokens.shape[1] - 1):
            target = tokens[row, position + 1]
            if target != pad_id:
                loss[row] -= logits[row, position].double().log_softmax(-1)[target]
                count[row] += 1
    return loss, count


@pytest.fixture
def set_chunk_size(monkeypatch):
    return lambda size: monkeypatch.setattr(module, "chunk_size", lambda device, vocabulary: size)


def inputs(batch=3, length=6, width=8, vocabulary=11, dtype=torch.float64):
    hidden = torch.randn(batch, length, width, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight


@pytest.mark.parametrize("pad_id", [None, 0])
@pytest.mark.parametrize("function", [linear_cross_entropy, reference_linear_cross_entropy])
def test_every_row_sums_its_own_targets(function, pad_id):
    (hidden, weight), tokens = inputs(), torch.randint(1, 11, (3, 6))
    tokens[1, 3:] = 0
    loss = function(hidden, weight, next_tokens(tokens, pad_id))
    expected, number = by_hand(hidden @ weight.T, tokens, pad_id)
    torch.testing.assert_close(loss.per_sequence, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.total, expected.sum(), rtol=1e-12, atol=1e-12)
    assert torch.equal(loss.counts, number)
    assert loss.counts.tolist() == ([5, 5, 5] if pad_id is None else [5, 2, 5])
    assert not loss.per_sequence.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_next_tokens_of_any_integers_mark_the_end(dtype):
    targets = next_tokens(torch.tensor([[5, 6, 7]]).to(dtype))
    assert (targets.dtype, targets.tolist()) == (torch.int64, [[6, 7, IGNORE]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_next_tokens_of_no_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"tokens are {dtype}, expected integers"):
        next_tokens(torch.ones(1, 3, dtype=dtype))


def test_next_tokens_does_not_change_the_tokens():
    tokens = torch.tensor([[5, 0, 7, 0]])
    assert next_tokens(tokens, 0).tolist() == [[IGNORE, 7, IGNORE, IGNORE]]
    assert tokens.tolist() == [[5, 0, 7, 0]]


def test_prompt_tokens_are_not_targets():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0], [5, 6, 7, 8]])
    _ = IGNORE
    assert next_tokens(tokens, 0, torch.tensor([1, 2, 4])).tolist() == [[6, 7, 8, _], [_, 7, _, _], [_, _, _, _]]
    assert next_tokens(tokens, 0, torch.tensor([0, 0, 0])).tolist() == next_tokens(tokens, 0).tolist()


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
def test_correct_counts_the_targets_with_the_largest_logit(set_chunk_size, chunk):
    set_chunk_size(chunk)
    hidden, weight = inputs()
    best = (hidden @ weight.T).argmax(-1)
    targets = torch.where(torch.rand(3, 6) < 0.5, best, torch.randint(11, (3, 6)))
    targets[1, 2:] = IGNORE
    with torch.no_grad():
        correct = linear_cross_entropy(hidden, weight, targets).correct
    assert correct.tolist() == [
        sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(targets, best, strict=True)
    ]
    assert torch.equal(correct, reference_linear_cross_entropy(hidden, weight, targets).correct)
    assert linear_cross_entropy(hidden, weight, targets).correct is None


@pytest.mark.parametrize("chunk", [1, 5, 9, 10**6])
def test_gradients_do_not_depend_on_the_chunk_size(set_chunk_size, chunk):
    set_chunk_size(chunk)
    hidden, weight = inputs()
    targets = next_tokens(torch.randint(11, (3, 6)), 0)
    results = []
    for function in (linear_cross_entropy, reference_linear_cross_entropy):
        total = function(hidden, weight, targets).total
        results.append((total, *torch.autograd.grad(0.37 * total, [hidden, weight])))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 60),
    free_hidden=st.booleans(),
    free_weight=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape_and_frozen_input_equals_the_reference(
    batch, length, width, vocabulary, free_hidden, free_weight, seed
):
    torch.manual_seed(seed)
    hidden, weight = inputs(batch, length, width, vocabulary)
    hidden.requires_grad_(free_hidden)
    weight.requires_grad_(free_weight)
    targets = torch.randint(vocabulary, (batch, length))
    targets[torch.rand(batch, length) < 0.3] = IGNORE
    wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    results = []
    for function in (linear_cross_entropy, reference_linear_cross_entropy):
        loss = function(hidden, weight, targets)
        results.append((loss.total, loss.per_sequence, *(torch.autograd.grad(loss.total, wanted) if wanted else ())))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_only_ignored_targets_have_a_loss_of_zero():
    hidden, weight = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full((3, 6), IGNORE))
    loss.total.backward()
    assert loss.total == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_all_logits_at_once(set_chunk_size, dtype):
    set_chunk_size(4)
    hidden, weight = inputs(128, 1, 64, 500, dtype)
    targets = torch.randint(500, (128, 1))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]

    def results(function, *leaves):
        """The loss of every token, and the gradients."""
        loss = function(*leaves, targets)
        return [loss.per_sequence, *torch.autograd.grad(loss.total / 128, leaves)]

    truth = results(reference_linear_cross_entropy, *exact)
    ours, plain = (
        [(a.double() - b).norm() / b.norm() for a, b in zip(results(function, hidden, weight), truth, strict=True)]
        for function in (linear_cross_entropy, reference_linear_cross_entropy)
    )
    for error, allowed in zip(ours, plain, strict=True):
        assert error <= 1.2 * allowed


def test_the_loss_of_half_precision_is_summed_in_float32():
    hidden, weight = inputs(dtype=torch.bfloat16)
    assert linear_cross_entropy(hidden, weight, torch.randint(11, (3, 6))).total.dtype == torch.float32


def test_a_weights_gradient_is_summed_in_float32_over_many_chunks(set_chunk_size):
    hidden, weight = inputs(16, 64, 16, 20, torch.bfloat16)
    targets = torch.randint(20, (16, 64))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    (truth,) = torch.autograd.grad(reference_linear_cross_entropy(*exact, targets).total, exact[1])
    errors = []
    for chunk in (1024, 4):
        set_chunk_size(chunk)
        (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).total, weight)
        errors.append(float((gradient.double() - truth).norm() / truth.norm()))
    # 256 chunks add roundings of their parts, which average out; a sum in bfloat16 would be off by more than 1e-2.
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 65_536.0), (torch.bfloat16, 1 / (512 * 255))])
def test_the_upstream_gradient_is_not_rounded_to_half_precision(dtype, scale):
    """The first scale overflows float16; the second, 1 / (tokens of a batch), is off by 3.9e-3 in bfloat16."""
    hidden, weight = inputs(8, 32, 32, 40, dtype)
    targets = torch.randint(40, (8, 32))
    total = linear_cross_entropy(hidden, weight, targets).total
    for leaf in (hidden, weight):
        (once,) = torch.autograd.grad(total, leaf, retain_graph=True)
        (scaled,) = torch.autograd.grad(total * scale, leaf, retain_graph=True)
        expected = once.double() * scale
        inside = expected.abs() < 65_000
        assert scaled[inside].isfinite().all()
        ratio = (scaled.double()[inside] * expected[inside]).sum() / expected[inside].square().sum()
        assert float(ratio) == pytest.approx(1, abs=2.5e-3)


def test_nan_at_an_ignored_target_does_not_change_the_loss():
    hidden, weight = inputs(1, 3, 4, 5)
    with torch.no_grad():
        hidden[0, 1] = float("nan")
    targets = torch.tensor([[2, IGNORE, 3]])
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.total.backward()
    assert loss.total.isfinite()
    assert hidden.grad[0, [0, 2]].isfinite().all()
    assert not hidden.grad[0, 1].nan_to_num(0).any()


@pytest.mark.parametrize("target", [-1, 11])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(*inputs(), torch.full((3, 6), target))


def test_no_grad_computes_no_gradients():
    hidden, weight = inputs()
    targets = torch.randint(11, (3, 6))
    gradients = {"aten.scatter_add_.default", "aten.addmm_.default", "aten.exp_.default", "aten.zeros.default"}
    with OperatorCalls() as trained:
        linear_cross_entropy(hidden, weight, targets)
    with OperatorCalls() as evaluated, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)
    assert trained.calls.keys() >= gradients
    assert not evaluated.calls.keys() & gradients


def test_autocast_rounds_the_products_and_gradients_have_the_dtype_of_the_parameters():
    hidden, weight = inputs(2, 8, 32, 50, torch.float32)
    targets = torch.randint(50, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, targets).total
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets).total
    assert torch.equal(total, rounded)
    gradients = torch.autograd.grad(total, [hidden, weight])
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]


def test_torch_func_runs_the_reference():
    hidden, weight = inputs()
    targets = torch.randint(11, (3, 6))
    gradient = torch.func.grad(lambda h: linear_cross_entropy(h, weight.detach(), targets).total)(hidden.detach())
    (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).total, hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_an_error():
    hidden, weight = inputs()
    total = linear_cross_entropy(hidden, weight, torch.randint(11, (3, 6))).total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_the_logits_of_all_tokens_are_never_in_memory_at_once(set_chunk_size):
    """The largest tensor of a forward and backward pass is a chunk of logits or a gradient."""
    set_chunk_size(16)
    hidden, weight = inputs(8, 32, 16, 1000, torch.float32)
    targets = torch.randint(1000, (8, 32))

    sizes = []
    for loss in (linear_cross_entropy, reference_linear_cross_entropy):
        with OperatorCalls() as operators:
            loss(hidden, weight, targets).total.backward()
        sizes.append(operators.largest)
    assert sizes == [16 * 1000, 256 * 1000]


@pytest.mark.parametrize(("vocabulary", "tokens"), [(300, 6990), (4096, 512), (32_000, 256), (150_000, 256)])
def test_a_chunk_on_a_cpu_has_two_million_logits_but_at_least_256_tokens(vocabulary, tokens):
    assert module.chunk_size(torch.device("cpu"), vocabulary) == tokens
