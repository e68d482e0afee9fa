"""The decoder with Triton norms: compiled, sharded, with activation checkpointing, under autocast and in training."""

import pytest
import torch
import torch.multiprocessing
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.kernels.reference import reference_add_norm
from cod_lightning.nn import norms
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.spec import INITIAL, OPTIMIZER
from cod_lightning.nn.strategies import build_all
from strategy_kinds import covering_strategies, label

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 61

compiles = pytest.mark.filterwarnings("default")  # Dynamo trips over warnings that it provokes itself


def build(backend, name="lns", depth=2, options=(), **changes):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    config = DecoderConfig(**(shape | {"num_hidden_layers": depth, "norm_backend": backend} | changes))
    return build_decoder(config, build_all({"name": name, **dict(options)}, depth), seed=0, device=DEVICE)


def tokens(batch=2, length=9):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def loss_and_gradients(decoder):
    batch = tokens()
    total = decoder(batch, next_tokens(batch)).total
    return [total.detach(), *torch.autograd.grad(total, list(decoder.parameters()))]


def use_the_reference(monkeypatch):
    monkeypatch.setattr(
        norms, "add_norm", lambda *tensors, backend, **settings: reference_add_norm(*tensors, **settings)
    )


def assert_equal(ours, expected, tolerance=1e-5):
    for a, b in zip(ours, expected, strict=True):
        assert float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm()) + 1e-7


def largest_error(results, exact):
    """The largest relative error of loss and gradients.

    Learned numbers, at most three a sub-layer, are one vector: some gradients are exact by chance, and some are zero
    but for rounding, as those of the first block's mix with the embeddings before a norm.
    """

    def pooled(loss, *gradients):
        numbers = [gradient.flatten() for gradient in gradients if gradient.numel() <= 3]
        return [loss, torch.cat([loss.new_zeros(1), *numbers]), *(g for g in gradients if g.numel() > 3)]

    pairs = zip(pooled(*results), pooled(*exact), strict=True)
    return max(float((ours - truth).norm() / truth.norm().clamp(min=1e-30)) for ours, truth in pairs)


COVERING = covering_strategies(ignore=(*INITIAL, *OPTIMIZER))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("norm", COVERING, ids=label)
def test_strategies_of_all_coefficients_err_with_triton_as_little_as_with_the_reference(norm, kind, monkeypatch):
    fused = loss_and_gradients(build("triton", options=norm, norm=kind))
    use_the_reference(monkeypatch)
    reference = loss_and_gradients(build("torch", options=norm, norm=kind))
    exact = loss_and_gradients(build("torch", options=norm, norm=kind).double())
    assert largest_error(fused, exact) <= 4 * largest_error(reference, exact)


def test_unsupported_backends_are_an_error():
    with pytest.raises(ValueError, match=r"model.norm_backend='cuda' does not exist: known: auto, torch, triton"):
        build("cuda")
    with pytest.raises(UserError, match=r"^norm_backend='triton' does not support this: torch.float64"):
        build("triton").double()(tokens())
    assert build("auto").double()(tokens()).dtype == torch.float64


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_rounds_the_inputs_of_projections_but_not_the_stream(backend):
    decoder, seen, stream = build(backend), {}, set()
    for name, module in decoder.named_modules():
        if name.endswith(("q_proj", "up_proj", "lm_head")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].dtype}))
    with torch.autocast(DEVICE, torch.bfloat16):
        decoder(tokens(), hook=lambda name, layer, x: stream.add(x.dtype) if name == "residual" else None)
        loss = decoder(tokens(), next_tokens(tokens())).total
    assert stream == {torch.float32}
    assert list(seen.values()) == 5 * [torch.bfloat16]
    exact = build("torch")(tokens(), next_tokens(tokens())).total
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


def test_activation_checkpointing_is_bit_identical():
    expected = loss_and_gradients(build("triton"))
    decoder = build("triton")
    for block in decoder.blocks:
        block.forward = lambda *args, inner=block.forward: checkpoint(inner, *args, use_reentrant=False)
    for ours, plain in zip(loss_and_gradients(decoder), expected, strict=True):
        assert torch.equal(ours, plain)


@compiles
@pytest.mark.parametrize(
    ("backend", "name", "options"),
    [
        ("triton", "lns", {}),
        ("torch", "lns", {}),
        ("triton", "lns", {"position": "before_ln"}),
        ("torch", "lns", {"position": "before_ln"}),
        ("triton", "derf", {"base": "lns"}),
        ("triton", "bhyt", {"base": "lns", "position": "before_ln"}),
        ("torch", "hybrid_norm", {}),
    ],
)
def test_all_blocks_need_two_compilations_without_a_graph_break(backend, name, options):
    torch._dynamo.reset()
    decoder = build(backend, name, depth=4, options=options)
    expected = loss_and_gradients(decoder)
    counter = CompileCounterWithBackend("aot_eager")
    for block in decoder.blocks:
        block.compile(backend=counter, fullgraph=True)
    assert_equal(loss_and_gradients(decoder), expected)
    assert counter.frame_count <= 2


@compiles
@pytest.mark.slow
def test_inductor_compiles_blocks_with_triton_norms(tmp_path, monkeypatch):
    # The cache of a processor with other instructions gives wrong results.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    decoder = build("triton", depth=1, norm="layer")
    expected = loss_and_gradients(decoder)
    for block in decoder.blocks:
        block.compile(fullgraph=True)
    assert_equal(loss_and_gradients(decoder), expected)


def shard(rank, folder):
    """A rank of a sharded model; the first one saves what it computed."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    decoder = build("triton", norm="layer")
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh)
    batch = tokens()[rank : rank + 1]
    loss = decoder(batch, next_tokens(batch)).total
    loss.backward()
    gradients = [parameter.grad.full_tensor() for parameter in decoder.parameters()]
    torch.distributed.all_reduce(total := loss.detach().clone())
    if rank == 0:
        torch.save([total, *gradients], folder / "gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks on CPUs need interpreted kernels")
def test_two_ranks_of_fsdp2_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(shard, (tmp_path,), nprocs=2)
    total, *gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = loss_and_gradients(build("triton", norm="layer"))
    # FSDP averages the gradients over the ranks.
    assert_equal([total, *(2 * gradient for gradient in gradients)], expected)


def test_training_stays_within_the_error_of_the_reference(monkeypatch):
    def curve(backend, dtype=torch.float32):
        decoder = build(backend).to(dtype)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(16):
            start = torch.randint(VOCABULARY, (4, 1), generator=generator)
            batch = ((start + 7 * torch.arange(12)) % VOCABULARY).to(DEVICE)
            loss_sums = decoder(batch, next_tokens(batch))
            loss = loss_sums.total / loss_sums.counts.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=torch.float64)

    triton = curve("triton")
    use_the_reference(monkeypatch)
    exact, plain = curve("torch", torch.float64), curve("torch")
    assert exact[-1] < 0.95 * exact[0]
    assert (triton - exact).abs().max() <= 4 * (plain - exact).abs().max()
