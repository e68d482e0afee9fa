"""The Triton kernels, interpreted without a GPU, against the reference in float64.

The tolerance is the error of plain torch operations in the same dtype.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from cod_lightning.errors import UserError
from cod_lightning.kernels import triton_norm
from cod_lightning.kernels.norm import add_norm
from cod_lightning.kernels.reference import BOUNDED, reference_add_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager_norm(x, weight=None, branch=None, *, kind="rms", eps=1e-6, gain=1.0):
    """The usual operations of models: add, upcast, square, mean, scale, downcast, times weight, times gain."""
    stream = x if branch is None else x + branch
    centred = stream.float()
    if kind == "layer":
        centred = centred - centred.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).to(stream.dtype)
    return stream, (y if weight is None else y * weight) * gain


def fused_norm(*tensors, **settings):
    return add_norm(*tensors, **settings, backend="triton")


def draw(rows, width, dtype=torch.float32, affine=True, branched=True, seed=0):
    """x, weight, branch and the cotangents of stream and y."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, branch = 2 * normal(rows, width) + 0.3, normal(rows, width)
    weight = 1 + 0.3 * normal(width)
    tensors = [x, weight if affine else None, branch if branched else None, normal(rows, width), normal(rows, width)]
    return [None if t is None else t.to(DEVICE, dtype) for t in tensors]


def outputs_and_gradients(function, x, weight, branch, dstream, dy, **settings):
    """Outputs and gradients by name."""
    inputs = {"dx": x, "dw": weight, "dbranch": branch}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.items() if leaf is not None}
    stream, y = function(leaves["dx"], leaves.get("dw"), leaves.get("dbranch"), **settings)
    gradients = torch.autograd.grad([stream, y], list(leaves.values()), [dstream, dy])
    return {"stream": stream.detach(), "y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_float64(function, *tensors, **settings):
    return outputs_and_gradients(function, *(None if t is None else t.double() for t in tensors), **settings)


def errors(results, truth):
    """Relative error of every output, in the L2 norm over its elements."""
    return {name: float((results[name].double() - exact).norm() / exact.norm()) for name, exact in truth.items()}


def assert_no_worse(results, plain, truth, factor=1):
    """Every error is at most `factor` times that of plain operations, or four roundings of float32, their dtype."""
    plain = errors(plain, {name: truth[name] for name in plain})
    for name, error in errors(results, truth).items():
        assert error <= max(factor * plain.get(name, 0), 4 * 2**-24), name


def assert_as_accurate_as_the_reference(*tensors, **settings):
    """Every error is at most four times that of the reference in the same dtypes."""
    results, plain = (
        outputs_and_gradients(function, *tensors, **settings) for function in (fused_norm, reference_add_norm)
    )
    truth = in_float64(reference_add_norm, *tensors, **{k: v for k, v in settings.items() if k != "dtype"})
    assert results.keys() == truth.keys()
    assert {name: r.dtype for name, r in results.items()} == {name: r.dtype for name, r in plain.items()}
    assert_no_worse(results, plain, truth, factor=4)


SIZES = [(1, 64), (64, 64), (33, 100), (7, 768), (33, 768), (7, 4096)]
LARGE = [(32_768, width) for width in (768, 1024, 2048, 4096)]
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")]


@pytest.mark.parametrize(("rows", "width"), [*SIZES, *(pytest.param(*size, marks=GPU) for size in LARGE)])
def test_errors_stay_within_those_of_plain_operations(rows, width):
    for dtype, kind, branched in itertools.product(DTYPES, ("rms", "layer"), (False, True)):
        tensors = draw(rows, width, dtype, branched=branched)
        settings = {"kind": kind, "eps": 1e-5, "gain": 7**-0.5}
        fused = outputs_and_gradients(fused_norm, *tensors, **settings)
        plain = outputs_and_gradients(eager_norm, *tensors, **settings)
        # Both round the sum to the same stream, which is the input of the exact norm.
        truth = in_float64(reference_add_norm, plain["stream"], tensors[1], None, *tensors[3:], **settings)
        if branched:
            truth["dbranch"] = truth["dx"]
        assert torch.equal(fused["stream"], plain["stream"])
        assert_no_worse(fused, plain, truth)


def test_layer_norm_is_exact_where_the_mean_is_large():
    """A mean of 1,000 is off by 3e-5 in float32, which a deviation of 0.6 would magnify to 5e-5 of the output."""
    x, weight, branch, dstream, dy = draw(33, 768)
    x = 1000 + 0.6 * x / x.std()
    for tensors in ((x, weight, None, dstream, dy), (x, weight, 0.01 * branch, dstream, dy)):
        results = outputs_and_gradients(fused_norm, *tensors, kind="layer")
        truth = in_float64(reference_add_norm, results["stream"], weight, None, dstream, dy, kind="layer")
        assert max(errors(results, truth).values()) < 8 * 2**-24  # eight roundings of float32


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_variant_equals_the_reference(kind, affine, groups):
    for branched, gain in itertools.product((False, True), (1.0, 0.2)):
        tensors = draw(21, 200, affine=affine, branched=branched)
        assert_as_accurate_as_the_reference(*tensors, kind=kind, eps=1e-4, gain=gain, groups=groups)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    width=st.integers(1, 300),
    kind=st.sampled_from(["rms", "layer"]),
    layout=st.sampled_from(["contiguous", "rows apart", "columns apart", "transposed", "expanded", "permuted"]),
    seed=st.integers(0, 9),
)
def test_any_shape_and_strides_equal_the_reference(shape, width, kind, layout, seed):
    def laid_out(x):
        if layout == "rows apart":
            return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
        if layout == "columns apart":
            return x.repeat_interleave(2, -1)[..., ::2]
        if layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "permuted" and len(shape) > 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x

    x, weight, branch, dstream, dy = draw(max(1, torch.Size(shape).numel()), width, seed=seed)
    x, branch, dstream, dy = (
        laid_out(t[: torch.Size(shape).numel()].view(*shape, width)) for t in (x, branch, dstream, dy)
    )
    if layout == "expanded":
        dy = torch.full((), 0.7, device=DEVICE).expand(x.shape)
        weight = weight[:1].expand(width)
    results = outputs_and_gradients(fused_norm, x, weight, branch, dstream, dy, kind=kind, eps=1e-3)
    truth = in_float64(reference_add_norm, x, weight, branch, dstream, dy, kind=kind, eps=1e-3)
    for name, exact in truth.items():
        assert results[name].shape == exact.shape
        torch.testing.assert_close(results[name].double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_repeated_runs_are_equal_to_the_bit_and_every_output_is_written(kind):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = draw(33, 768, dtype)
        first = outputs_and_gradients(fused_norm, *tensors, kind=kind)
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            assert torch.empty(3).isnan().all()
            second = outputs_and_gradients(fused_norm, *tensors, kind=kind)
        finally:
            torch.use_deterministic_algorithms(False)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_zeros_and_extreme_inputs_equal_the_reference(kind):
    x, weight, branch, dstream, dy = draw(12, 96)
    weight[::3] = 0
    x[0] = branch[0] = 0
    for row, scale in enumerate((1e-20, 1e-8, 1e-4, 1e4, 1e10, 1e17), start=1):
        x[row], branch[row] = x[row] * scale, branch[row] * scale
    settings = {"kind": kind, "eps": 1e-6, "gain": 0.3}
    results = outputs_and_gradients(fused_norm, x, weight, branch, dstream, dy, **settings)
    truth = in_float64(reference_add_norm, x, weight, branch, dstream, dy, **settings)
    assert not results["y"][0].any()
    assert not results["y"][:, ::3].any()
    for name in ("y", "dx"):
        for ours, exact in zip(results[name], truth[name], strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=float(exact.abs().max()) * 1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_square_beyond_float32_equals_the_reference():
    x = torch.full((2, 64), 1e30, device=DEVICE)
    assert torch.equal(add_norm(x, backend="triton")[1], reference_add_norm(x)[1])


def test_outputs_and_gradients_have_the_dtypes_of_autocast():
    x, weight, branch, dstream, dy = draw(17, 100)
    tensors = x, weight, branch.bfloat16(), dstream, dy.bfloat16()
    results = outputs_and_gradients(fused_norm, *tensors, dtype=torch.bfloat16)
    assert {name for name, value in results.items() if value.dtype == torch.bfloat16} == {"y", "dbranch"}
    assert_as_accurate_as_the_reference(*tensors, dtype=torch.bfloat16)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_of_y_alone_equals_the_reference(frozen):
    x, weight, branch, dstream, dy = draw(9, 64)
    exact = in_float64(reference_add_norm, x, weight, branch, torch.zeros_like(dstream), dy)
    fused_norm(x.requires_grad_(), weight.requires_grad_(not frozen), branch.requires_grad_())[1].backward(dy)
    for leaf, name in ((x, "dx"), (branch, "dbranch")):
        torch.testing.assert_close(leaf.grad.double(), exact[name], rtol=1e-5, atol=1e-6)
    assert (weight.grad is None) == frozen


def test_the_gradient_of_the_stream_alone_equals_the_reference():
    x, weight, branch, dstream, _ = draw(9, 64)
    leaves = [t.requires_grad_() for t in (x, weight, branch)]
    fused_norm(*leaves)[0].backward(dstream)
    assert torch.equal(x.grad, dstream)
    assert torch.equal(branch.grad, dstream)
    assert weight.grad is None


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_stream_carries_the_gradient_of_later_layers(backend):
    x, weight, _, dstream, dy = draw(9, 64, branched=False)
    stream, y = add_norm(x.requires_grad_(), weight, backend=backend)
    ((stream * dstream).sum() + (y * dy).sum()).backward()
    exact = in_float64(reference_add_norm, x.detach(), weight, None, dstream, dy)["dx"]
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("default")  # Dynamo trips over warnings that it provokes itself
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transform", ["vjp", "jvp", "grad", "hessian"])
def test_torch_func_goes_through_the_reference(transform, compiled):
    x, weight, _, _, dy = draw(3, 8, branched=False)

    def value(function):
        def f(x):
            return (function(x, weight, kind="layer")[1] * dy).sum()

        if transform == "vjp":
            return torch.func.vjp(f, x)[1](torch.ones((), device=DEVICE))[0]
        if transform == "jvp":
            return torch.func.jvp(f, (x,), (dy,))[1]
        return getattr(torch.func, transform)(f)(x)

    if compiled:
        value = torch.compile(value, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value(fused_norm), value(reference_add_norm))


def test_a_second_derivative_is_an_error():
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    y = add_norm(x, backend="triton")[1].square().sum()
    with pytest.raises(RuntimeError, match="no second derivative; norm_backend='torch' has"):
        torch.autograd.grad(y, x, create_graph=True)


def test_a_missing_upstream_gradient_is_not_an_error():

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            return None

    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    Stop.apply(add_norm(x, backend="triton")[1]).backward()
    assert x.grad is None


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("branched", [True, False])
def test_the_custom_operators_pass_opcheck(layer, branched):
    x, weight, branch, dstream, dy = draw(5, 48, branched=branched)
    gain, eps = torch.tensor(0.5, device=DEVICE), torch.tensor(1e-5, device=DEVICE)
    library.opcheck(triton_norm.forward_op, (x, weight, branch, gain, eps, layer, 2, None))
    _, rstd, *mean = triton_norm.forward(x, weight, None, gain, eps, layer, 2, None)
    mean = mean[0] if layer else None
    kept = (x, weight, mean, rstd, dy, dstream if branched else None, gain)
    library.opcheck(triton_norm.backward_op, (*kept, torch.float32, torch.bfloat16 if branched else None, True))


@pytest.mark.parametrize(
    ("x", "more", "reason"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), {}, "torch.float64 is not float32, bfloat16 or float16"),
        (torch.zeros(2, 20_000), {}, "groups of 20000 channels exceed the maximum of 16384"),
        (torch.zeros(2, 8).as_subclass(type("Sharded", (torch.Tensor,), {})), {}, "need plain tensors, not Sharded"),
        (torch.zeros(2, 8), {"branch": torch.zeros(8)}, r"the branch has the shape \[8\], x \[2, 8\]"),
        (torch.zeros(1, 8), {"branch": torch.zeros(2, 8)}, r"the branch has the shape \[2, 8\], x \[1, 8\]"),
        (torch.zeros(2, 8), {"weight": torch.zeros(4)}, r"the weight has the shape \[4\], expected \[8\]"),
        (torch.zeros(2, 8), {"groups": 3}, "groups=3 does not divide"),
        (torch.zeros(2, 0), {}, "does not divide the hidden dimension"),
    ],
)
def test_unsupported_tensors_are_an_error_for_triton_and_run_in_torch(x, more, reason):
    x, more = x.to(DEVICE), {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in more.items()}
    with pytest.raises(UserError, match=reason):
        add_norm(x, backend="triton", **more)
    if "groups" in more or "weight" in more:
        with pytest.raises(RuntimeError):
            add_norm(x, **more)
    else:
        stream = x + more.get("branch", 0)
        assert add_norm(x, **more)[1].shape == stream.shape


@pytest.mark.parametrize(
    ("wrong", "known"), [({"kind": "RMSNorm"}, "rms or layer"), ({"backend": "cuda"}, "auto, torch or triton")]
)
def test_an_unknown_kind_or_backend_is_an_error(wrong, known):
    with pytest.raises(ValueError, match=f"must be {known}"):
        add_norm(torch.zeros(2, 8), **wrong)


def test_a_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(triton_norm, "INTERPRETED", False)
    with pytest.raises(UserError, match=r"the tensors are on cpu, not on a GPU .* use norm_backend='auto'"):
        add_norm(torch.zeros(2, 8), backend="triton")


@pytest.mark.parametrize(
    ("archs", "widths", "kinds"),
    [
        (("90",), ("4096",), ("rms", "layer")),
        pytest.param(("80", "90"), ("768", "1024", "2048", "4096"), ("rms", "layer"), marks=pytest.mark.extended),
        pytest.param(("80", "90"), ("768", "4096"), BOUNDED, marks=pytest.mark.extended),
    ],
)
def test_kernels_compile_for_gpus_and_do_not_spill(archs, widths, kinds):
    script = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"
    options = ["--arch", *archs, "--widths", *widths, "--dtypes", "bfloat16", "--kinds", *kinds]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(run.stdout.count(f"sm_{arch}") >= 9 * len(widths) for arch in archs)
