"""`add_norm` by torch's own kernels against the reference, and the comparison that guards an unknown GPU."""

import pytest
import torch

from cod_lightning.errors import UserError
from cod_lightning.kernels import norm, triton_norm
from cod_lightning.kernels.norm import add_norm, checked_backend, kernel_error
from cod_lightning.kernels.reference import reference_add_norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNEL_DEVICE = CUDA if torch.cuda.is_available() else CPU
"""Where the Triton kernels run."""
CASES = [
    (kind, affine, gain, groups)
    for kind in ("rms", "layer")
    for affine in (True, False)
    for gain in (1.0, 0.37)
    for groups in (1, 4)
]


EPS = (1e-5, 0.3)
"""The usual one, and one that is far from torch's defaults and shows after rounding."""


def inputs(dtype, affine):
    x = torch.randn(3, 5, 64, dtype=torch.float64).to(dtype) * 3
    return x, (1 + 0.2 * torch.randn(64, dtype=torch.float64)).to(dtype) if affine else None


@pytest.mark.parametrize("branched", [True, False])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("kind", "affine", "gain", "groups"), CASES)
def test_outputs_and_gradients_equal_the_reference_in_float64(eps, kind, affine, gain, groups, branched):
    x, weight = inputs(torch.float64, affine)
    branch = torch.randn_like(x) if branched else None
    leaves = [leaf.requires_grad_() for leaf in (x, weight, branch) if leaf is not None]
    cotangents = [torch.randn_like(x), torch.randn_like(x)]
    results = []
    for function in (add_norm, reference_add_norm):
        outputs = function(x, weight, branch, kind=kind, eps=eps, gain=gain, groups=groups)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, cotangents)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("kind", "affine", "gain", "groups"), CASES)
def test_rounding_error_stays_within_that_of_plain_operations(dtype, eps, kind, affine, gain, groups):
    x, weight = inputs(dtype, affine)
    settings = {"kind": kind, "eps": eps, "gain": gain, "groups": groups}
    exact = reference_add_norm(x.double(), None if weight is None else weight.double(), **settings)[1]
    y = add_norm(x, weight, **settings)[1]
    assert y.dtype == dtype
    # At most three roundings: the folded weight or the gain, the normalised value and the product. Near zero, where
    # LayerNorm subtracts a mean, the error is relative to x over its deviation, a few units.
    bound = torch.finfo(dtype).eps * (3 * exact.abs() + (8 if kind == "layer" else 1e-3))
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_gradient_of_the_weight_is_summed_in_float32(kind, dtype):
    x, weight, dy = (torch.randn(shape).to(dtype) for shape in ((2048, 64), (64,), (2048, 64)))

    def gradient(function, *tensors):
        x, weight, dy = tensors
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad(function(x, weight, kind=kind)[1], weight, dy)[0].double()

    exact = gradient(reference_add_norm, *(tensor.double() for tensor in (x, weight, dy)))
    ours, reference = gradient(add_norm, x, weight, dy), gradient(reference_add_norm, x, weight, dy)
    assert (ours - exact).norm() <= 1.1 * (reference - exact).norm()


@pytest.mark.parametrize("settings", [{"kind": "layer", "groups": 2}, {"kind": "rms"}])
def test_the_reference_is_differentiable_to_second_order(settings):
    x, branch = (torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def function(*tensors):
        return reference_add_norm(*tensors, gain=0.5, **settings)

    assert torch.autograd.gradcheck(function, (x, weight, branch))
    assert torch.autograd.gradgradcheck(function, (x, weight, branch))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", [7, 23])
def test_bfloat16_does_not_round_the_gain(layer, weight_dtype, backend):
    x = torch.randn(250, 64).to(KERNEL_DEVICE, torch.bfloat16)
    ones = torch.ones(64, dtype=weight_dtype, device=KERNEL_DEVICE)
    scaled, plain = (add_norm(x, ones, gain=gain, backend=backend)[1].double() for gain in (layer**-0.5, 1.0))
    # Errors of single elements (4e-3) average out; a wrong gain, 2.5e-3 in block 7, would not.
    assert float((scaled * plain).sum() / plain.square().sum()) == pytest.approx(layer**-0.5, rel=2e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_tiny_and_zero_inputs_stay_finite(scale):
    x = torch.randn(4, 64, dtype=torch.float64) * scale
    x[0] = 0
    y = add_norm(x, torch.ones(64, dtype=torch.float64), eps=1e-6)[1]
    assert y.isfinite().all()
    assert not y[0].any()


def test_the_output_can_have_its_own_dtype():
    x, weight = inputs(torch.float32, True)
    stream, y = add_norm(x, weight, dtype=torch.bfloat16, gain=0.3)
    assert stream.dtype == torch.float32
    assert torch.equal(y, add_norm(x, weight, gain=0.3)[1].bfloat16())


CASE = ("rms", 768, 1, torch.float32, torch.float32)
"""Kind, channels, groups, dtypes of stream and branch."""


class OnePercentOff:
    """A kernel with a wrong gain, its last argument."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **constants: self.kernel[grid](*args[:-1], 1.01 * args[-1], **constants)


@pytest.fixture
def replace_kernel(monkeypatch):
    """`replace_kernel(name, change)` replaces a Triton kernel by `change(kernel)` for a GPU that is the interpreter."""
    compare = kernel_error.__wrapped__
    monkeypatch.setattr(norm, "kernel_error", lambda device, *case: compare(KERNEL_DEVICE, *case))
    return lambda name, change: monkeypatch.setattr(triton_norm, name, change(getattr(triton_norm, name)))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("stream", "branch"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_right_kernels_pass_the_comparison(kind, stream, branch):
    assert kernel_error(KERNEL_DEVICE, kind, 768, 1, stream, branch) is None


@pytest.mark.parametrize(
    ("kernel", "tensor"), [("forward_kernel", "y"), ("backward_kernel", "dx"), ("dweight_kernel", "dweight")]
)
def test_a_wrong_kernel_is_replaced_by_torch_with_a_warning(kernel, tensor, replace_kernel):
    replace_kernel(kernel, OnePercentOff)
    with pytest.warns(
        UserWarning, match=rf"uses torch: .* wrong on {KERNEL_DEVICE}: {tensor} of norm is off by .*please report"
    ):
        assert checked_backend("auto", CUDA, *CASE) == "torch"


def test_a_kernel_that_fails_is_replaced_by_torch_with_a_warning(replace_kernel):
    replace_kernel("forward_kernel", lambda kernel: {})
    with pytest.warns(UserWarning, match=rf"the Triton kernels fail on {KERNEL_DEVICE}: "):
        assert checked_backend("auto", CUDA, *CASE) == "torch"


def test_triton_refuses_a_wrong_kernel(replace_kernel):
    replace_kernel("forward_kernel", OnePercentOff)
    with pytest.raises(UserError, match=r"norm_backend='triton': .*; use model.norm_backend=torch"):
        checked_backend("triton", CUDA, *CASE)


@pytest.mark.parametrize(("backend", "device"), [("torch", CUDA), ("auto", CPU), ("triton", CPU)])
def test_nothing_is_compared_without_kernels_on_a_gpu(backend, device, monkeypatch):
    monkeypatch.setattr(norm, "kernel_error", None)
    assert checked_backend(backend, device, *CASE) == backend


@pytest.mark.parametrize("function", [add_norm, reference_add_norm])
def test_an_unknown_kind_is_refused(function):
    with pytest.raises(ValueError, match=r"kind='batch' must be rms or layer"):
        function(torch.zeros(2, 8), kind="batch")
