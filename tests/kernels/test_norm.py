"""The norm by torch's own kernels against the reference, in float64 and by the reference's own rounding error."""

import pytest
import torch

from cod_lightning.kernels.norm import add_norm
from cod_lightning.kernels.reference import reference_add_norm

CASES = [
    (kind, affine, gain, groups)
    for kind in ("rms", "layer")
    for affine in (True, False)
    for gain in (1.0, 0.37)
    for groups in (1, 4)
]


def inputs(dtype, affine, requires_grad=False):
    x = torch.randn(3, 5, 64, dtype=torch.float64).to(dtype) * 3
    weight = (1 + 0.2 * torch.randn(64, dtype=torch.float64)).to(dtype) if affine else None
    for tensor in (x, weight):
        if requires_grad and tensor is not None:
            tensor.requires_grad_()
    return x, weight


@pytest.mark.parametrize("branched", [True, False])
@pytest.mark.parametrize(("kind", "affine", "gain", "groups"), CASES)
def test_outputs_and_gradients_equal_the_reference_in_float64(kind, affine, gain, groups, branched):
    results = []
    x, weight = inputs(torch.float64, affine, requires_grad=True)
    branch = torch.randn_like(x, requires_grad=True) if branched else None
    leaves = [leaf for leaf in (x, weight, branch) if leaf is not None]
    cotangents = [torch.randn_like(x), torch.randn_like(x)]
    for function in (add_norm, reference_add_norm):
        stream, y = function(x, weight, branch, kind=kind, eps=1e-5, gain=gain, groups=groups)
        gradients = torch.autograd.grad([stream, y], leaves, cotangents)
        results.append((stream, y, *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "affine", "gain", "groups"), CASES)
def test_rounding_error_stays_within_that_of_plain_operations(dtype, kind, affine, gain, groups):
    x, weight = inputs(dtype, affine)
    settings = {"kind": kind, "eps": 1e-5, "gain": gain, "groups": groups}
    exact = reference_add_norm(x.double(), None if weight is None else weight.double(), **settings)[1]
    y = add_norm(x, weight, **settings)[1]
    assert y.dtype == dtype
    # Rounded at most three times: the folded weight or the gain, the normalised value and the product. Near zero, where
    # LayerNorm subtracts a mean, what counts is the size of x over its deviation, a few units.
    bound = torch.finfo(dtype).eps * (3 * exact.abs() + (8 if kind == "layer" else 1e-3))
    assert ((y.double() - exact).abs() <= bound).all()


def test_reference_is_differentiable_to_second_order():
    x, weight = inputs(torch.float64, True, requires_grad=True)
    x = x[:1, :2, :6].detach().requires_grad_()
    weight = weight[:6].detach().requires_grad_()
    branch = torch.randn_like(x, requires_grad=True)
    for settings in ({"kind": "layer", "groups": 2}, {"kind": "rms"}):

        def function(a, b, c, settings=settings):
            return reference_add_norm(a, b, c, gain=0.5, **settings)[:2]

        assert torch.autograd.gradcheck(function, (x, weight, branch))
        assert torch.autograd.gradgradcheck(function, (x, weight, branch))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", [2, 7, 11, 23])
def test_the_gain_is_not_rounded_in_bfloat16(layer, weight_dtype, backend):
    x = torch.randn(2000, 64).bfloat16()
    ones = torch.ones(64, dtype=weight_dtype)
    scaled, plain = (add_norm(x, ones, gain=gain, backend=backend)[1].double() for gain in (layer**-0.5, 1.0))
    # Errors of single elements (4e-3) average out; a wrong gain, 2.5e-3 in block 7, would not.
    assert float((scaled * plain).sum() / plain.square().sum()) == pytest.approx(layer**-0.5, rel=2e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_tiny_and_zero_rows_stay_finite(scale):
    x = torch.randn(4, 64, dtype=torch.float64) * scale
    x[0] = 0
    y = add_norm(x, torch.ones(64, dtype=torch.float64), eps=1e-6)[1]
    assert y.isfinite().all()
    assert torch.equal(y[0], torch.zeros(64, dtype=torch.float64))


def test_the_output_can_have_a_dtype_of_its_own():
    x, weight = inputs(torch.float32, True)
    stream, y = add_norm(x, weight, dtype=torch.bfloat16, gain=0.3)
    assert stream.dtype == torch.float32
    assert torch.equal(y, add_norm(x, weight, gain=0.3)[1].bfloat16())
