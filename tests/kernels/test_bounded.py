"""DyT, Derf and BHyT: the reference against their equations, and the Triton kernels, interpreted, against it."""

import itertools

import pytest
import torch
from torch import library

from cod_lightning.errors import UserError
from cod_lightning.kernels import triton_bounded
from cod_lightning.kernels.norm import bounded_norm, kernel_error
from cod_lightning.kernels.reference import BOUNDED, reference_bounded_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "alpha", "weight", "bias", "shift", "branch")


def draw(kind, rows=9, width=48, dtype=torch.float64, branched=True, seed=0):
    """The tensors of a norm in the order of `NAMES`, and the cotangents of stream and y."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    alpha = torch.full((1,), 3.0 if kind == "bhyt" else 0.5, dtype=torch.float64)
    shift = torch.full((1,), 0.2, dtype=torch.float64) if kind == "derf" else None
    bias = None if kind == "bhyt" else 0.3 * normal(width)
    tensors = [2 * normal(rows, width) + 0.3, alpha, 1 + 0.3 * normal(width), bias, shift]
    tensors += [normal(rows, width) if branched else None, normal(rows, width), normal(rows, width)]
    return [None if t is None else t.to(DEVICE, dtype) for t in tensors]


def outputs_and_gradients(function, *tensors, **settings):
    """Outputs and gradients by name."""
    *inputs, dstream, dy = tensors
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, **settings)
    present = {f"d{name}": leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    cotangents = [t.to(y.dtype) for t, y in zip((dstream, dy), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(present.values()), cotangents)
    return dict(zip(("stream", "y", *present), (*(y.detach() for y in outputs), *gradients), strict=True))


def fused(*tensors, **settings):
    return bounded_norm(*tensors, **settings, backend="triton")


def pooled(results):
    """Results in float64, gradients of parameters as one vector: those of single numbers are sums that cancel."""
    parameters = [name for name in ("dalpha", "dweight", "dbias", "dshift") if name in results]
    others = {name: result.double() for name, result in results.items() if name not in parameters}
    return others | {"parameters": torch.cat([results[name].double() for name in parameters])}


def assert_as_accurate_as_the_reference(*tensors, **settings):
    """Every error is at most four times that of the reference in the same dtypes, or four roundings of float32."""
    results, plain = (
        outputs_and_gradients(function, *tensors, **settings) for function in (fused, reference_bounded_norm)
    )
    exact = [None if t is None else t.double() for t in tensors]
    truth = outputs_and_gradients(reference_bounded_norm, *exact, **(settings | {"dtype": None}))
    assert {name: r.dtype for name, r in results.items()} == {name: r.dtype for name, r in plain.items()}
    for name, expected in pooled(truth).items():
        error, allowed = ((pooled(r)[name] - expected).norm() / expected.norm() for r in (results, plain))
        assert error <= 4 * max(float(allowed), 2**-24), name


def test_the_reference_is_the_published_equation():
    for kind in BOUNDED:
        x, alpha, weight, bias, shift, branch, *_ = draw(kind)
        s = x + branch
        expected = {
            "dyt": lambda s=s, a=alpha, w=weight, b=bias: w * torch.tanh(a * s) + b,
            "derf": lambda s=s, a=alpha, w=weight, b=bias, h=shift: w * torch.erf(a * s + h) + b,
            "bhyt": lambda s=s, a=alpha, w=weight: w * torch.tanh(a / (10 * (s**2).mean(-1, True).sqrt()) * s),
        }[kind]()
        stream, y = reference_bounded_norm(x, alpha, weight, bias, shift, branch, kind=kind, gain=0.5, eps=0.0)
        assert torch.equal(stream, s)
        torch.testing.assert_close(y, expected / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", BOUNDED)
def test_the_reference_is_differentiable_to_second_order(kind):
    tensors = [t if t is None else t.requires_grad_() for t in draw(kind, rows=2, width=4)[:6]]
    present = [t for t in tensors if t is not None]

    def function(*leaves):
        remaining = iter(leaves)
        return reference_bounded_norm(*(t if t is None else next(remaining) for t in tensors), kind=kind, gain=0.5)

    assert torch.autograd.gradcheck(function, present)
    assert torch.autograd.gradgradcheck(function, present)


@pytest.mark.parametrize("kind", BOUNDED)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (33, 100), (7, 768)])
def test_triton_errs_as_little_as_the_reference(kind, rows, width):
    for dtype, branched in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
        tensors = draw(kind, rows, width, dtype, branched)
        assert_as_accurate_as_the_reference(*tensors, kind=kind, eps=1e-5, gain=7**-0.5)


@pytest.mark.parametrize("kind", BOUNDED)
def test_triton_rounds_to_the_dtype_of_autocast(kind):
    x, alpha, weight, bias, shift, branch, dstream, dy = draw(kind, dtype=torch.float32)
    tensors = (x, alpha, weight, bias, shift, branch.bfloat16(), dstream, dy)
    assert_as_accurate_as_the_reference(*tensors, kind=kind, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", BOUNDED)
def test_triton_needs_no_weight_and_any_strides(kind):
    x, alpha, _, _, shift, branch, dstream, dy = draw(kind, rows=48, dtype=torch.float32)
    assert_as_accurate_as_the_reference(x.T, alpha, None, None, shift, branch, dstream, dy.T, kind=kind)


def test_tanh_is_within_two_roundings_everywhere():
    x = torch.linspace(-30, 30, 4001, device=DEVICE)[:, None] ** 3 / 900
    ours = fused(x, torch.ones(1, device=DEVICE), kind="dyt")[1].double()
    torch.testing.assert_close(ours, x.double().tanh(), rtol=2**-22, atol=0)


def test_the_gradient_of_the_stream_alone_is_handed_on():
    x, alpha, weight, bias, shift, branch, dstream, _ = draw("dyt", dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, branch)]
    stream, _ = fused(leaves[0], alpha, weight, bias, shift, leaves[1], kind="dyt")
    assert all(torch.equal(d, dstream) for d in torch.autograd.grad(stream, leaves, dstream))


def test_a_second_derivative_is_an_error():
    x, alpha, *_ = draw("bhyt", dtype=torch.float32)
    y = fused(x.requires_grad_(), alpha, kind="bhyt")[1].square().sum()
    with pytest.raises(RuntimeError, match="no second derivative; norm_backend='torch' has"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("kind", BOUNDED)
def test_the_custom_operators_pass_opcheck(kind):
    x, alpha, weight, bias, shift, branch, dstream, dy = draw(kind, rows=5, dtype=torch.float32)
    erf, normalised, eps = kind == "derf", kind == "bhyt", torch.tensor(1e-5, device=DEVICE)
    library.opcheck(
        triton_bounded.forward_op, (x, branch, weight, bias, alpha, shift, eps, erf, normalised, torch.bfloat16)
    )
    rstd = triton_bounded.forward(x, None, weight, bias, alpha, shift, 1e-5, erf, normalised, None)[1:]
    kept = (x, weight, alpha, shift, rstd[0] if normalised else None, dy, dstream, erf)
    library.opcheck(triton_bounded.backward_op, (*kept, torch.float32, torch.bfloat16))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "rms"}, r"kind='rms' must be dyt, derf or bhyt"),
        ({"backend": "cuda"}, r"backend='cuda' must be auto, torch or triton"),
        ({"alpha": torch.ones(8, device=DEVICE)}, r"alpha has the shape \[8\], expected \[1\]"),
        ({"shift": torch.ones(8, device=DEVICE)}, r"shift has the shape \[8\], expected \[1\]"),
        ({"weight": torch.ones(1, device=DEVICE)}, r"weight has the shape \[1\], expected \[8\]"),
        ({"bias": torch.ones(3, device=DEVICE), "backend": "triton"}, r"bias has the shape \[3\], expected \[8\]"),
        ({"bias": torch.ones(8, device=DEVICE).double(), "backend": "triton"}, "torch.float64 is not float32"),
        ({"alpha": torch.ones(1, device="meta"), "backend": "triton"}, "the tensors are on several devices"),
    ],
)
def test_arguments_that_the_kernels_would_misread_are_errors(wrong, message):
    with pytest.raises((ValueError, UserError), match=message):
        bounded_norm(
            torch.zeros(2, 8, device=DEVICE), **({"alpha": torch.ones(1, device=DEVICE), "kind": "dyt"} | wrong)
        )


@pytest.mark.parametrize("kind", BOUNDED)
def test_right_kernels_pass_the_comparison_with_the_reference(kind):
    assert kernel_error(torch.device(DEVICE), kind, 64, 1, torch.float32, torch.bfloat16) is None


def test_a_wrong_kernel_is_found(monkeypatch):
    right = triton_bounded.backward
    monkeypatch.setattr(triton_bounded, "backward", lambda *args: [1.01 * tensor for tensor in right(*args)])
    error = kernel_error.__wrapped__(torch.device(DEVICE), "bhyt", 64, 1, torch.float32, torch.float32)
    assert "dx of norm is off by" in error


def test_the_reference_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match=r"kind='rms' must be dyt, derf or bhyt"):
        reference_bounded_norm(torch.zeros(2, 8), torch.ones(1), kind="rms")
