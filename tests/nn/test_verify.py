"""`verify` measures the factors of a strategy in stock models, right and broken ones."""

from dataclasses import replace

import pytest
import torch
from stock_models import PLAIN as OUTPUTS
from stock_models import PlainBlock, PlainModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cod_lightning.errors import UserError
from cod_lightning.nn.apply import apply, fold
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.strategies import STRATEGIES, BlockSpec, SublayerSpec, build_all
from cod_lightning.nn.verify import verify
from tiny_models import tiny_decoder, tiny_llama

TOKENS = torch.arange(12)[None]
PLAIN = replace(OUTPUTS, outputs=None)
"""Some sub-layers here are no linear layers."""


class Block(PlainBlock):
    """Under LNS."""

    def factor(self):
        return self.layer**-0.5


class DeadBranch(Block):
    """Scales only in a mode that nothing sets, as the released code of the paper."""

    mode = "pre"

    def factor(self):
        return self.layer**-0.5 if self.mode == "lns" else 1.0


class WipedBuffer(Block):
    """Keeps the factor in a buffer, which is empty after the meta device, as in a large trainer."""

    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("scale", torch.tensor(layer**-0.5), persistent=False)

    def factor(self):
        return self.scale


class WipedNumber(Block):
    """Keeps its number in a buffer, which bfloat16 does not round and the meta device empties."""

    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("number", torch.tensor(layer), persistent=False)

    def factor(self):
        return self.number**-0.5


class MendedNumber(WipedNumber):
    def reset_buffers(self):
        self.number.fill_(self.layer)


class OffByOne(Block):
    """Counts layers from 0."""

    def factor(self):
        return max(self.layer - 1, 1) ** -0.5


class OnlyAttention(Block):
    def forward(self, x):
        x = x + self.attention(self.norm_1(x) * self.factor())
        return x + self.ffn(self.norm_2(x))


class HalvedBranch(Block):
    def forward(self, x):
        x = x + 0.5 * self.attention(self.norm_1(x) * self.factor())
        return x + self.ffn(self.norm_2(x) * self.factor())


class LostWhenCompiled(Block):
    def factor(self):
        return 1.0 if torch.compiler.is_compiling() else self.layer**-0.5


class LostWhenLoaded(Block):
    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self.layer = 1


class LostInTraining(Block):
    def factor(self):
        return 1.0 if self.training else self.layer**-0.5


class Dropped(Block):
    """Has dropout by a module and by a function."""

    def __init__(self, layer):
        super().__init__(layer)
        self.resid_dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.resid_dropout(self.attention(self.norm_1(x) * self.factor()))
        ffn = self.ffn(self.norm_2(x) * self.factor())
        return x + nn.functional.dropout(ffn, 0.5, self.training)


class Parallel(Block):
    """Both sub-layers read the input of the block, as GPT-NeoX's do."""

    def forward(self, x):
        return x + self.attention(self.norm_1(x) * self.factor()) + self.ffn(self.norm_2(x) * self.factor())


class HalvedParallel(Parallel):
    def forward(self, x):
        return x + self.attention(self.norm_1(x) * self.factor()) + 0.5 * self.ffn(self.norm_2(x) * self.factor())


class Merged(Block):
    """Merges batch and length before the FFN, as OPT does."""

    def forward(self, x):
        x = x + self.attention(self.norm_1(x) * self.factor())
        merged = x.flatten(0, 1)
        return (merged + self.ffn(self.norm_2(merged) * self.factor())).view(x.shape)


class InPlace(Block):
    """Adds the stream onto what its sub-layers return, as Falcon does."""

    def forward(self, x):
        h = self.attention(self.norm_1(x) * self.factor())
        h += x
        y = self.ffn(self.norm_2(h) * self.factor())
        y += h
        return y


class EpsilonNorm(nn.Module):
    """RMSNorm with an eps under another name."""

    def __init__(self, name):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        setattr(self, name, 1e-6)

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class AddingLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, h, x):
        return x + self.dense(h)


class Adding(Block):
    """Its sub-layers add the stream, as BLOOM's do."""

    def __init__(self, layer):
        super().__init__(layer)
        self.attention, self.ffn = AddingLinear(), AddingLinear()

    def forward(self, x):
        x = self.attention(self.norm_1(x) * self.factor(), x)
        return self.ffn(self.norm_2(x) * self.factor(), x)


class NormOfTwo(nn.RMSNorm):
    """Takes a further argument, as a norm under a condition does."""

    def forward(self, x, condition):
        return super().forward(x)


class Conditioned(Block):
    def __init__(self, layer):
        super().__init__(layer)
        self.norm_1 = NormOfTwo(8)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x, None) * self.factor())
        return x + self.ffn(self.norm_2(x) * self.factor())


class ConditionedCube(Conditioned):
    """Attention reads the cube of its norm."""

    def forward(self, x):
        x = x + self.attention(self.norm_1(x, None) ** 3 * self.factor())
        return x + self.ffn(self.norm_2(x) * self.factor())


def test_the_measured_factors_are_one_over_the_root_of_the_layer():
    factors = verify(PlainModel(Block), "lns", layout=PLAIN, inputs=TOKENS)
    gains = [factor.measured for factor in factors if factor.name == "gain" and factor.part == "ffn"]
    assert gains == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


@pytest.mark.parametrize("block", [MendedNumber, Dropped, Conditioned, Parallel, Merged, InPlace])
def test_a_right_implementation_passes(block):
    verify(PlainModel(block), "lns", layout=PLAIN, inputs=TOKENS.reshape(3, 4))


@pytest.mark.parametrize("name", ["epsilon", "norm_eps", "its_own"])
def test_a_norm_of_small_embeddings_with_an_eps_under_another_name_passes(name):
    model = PlainModel(Block)
    nn.init.normal_(model.embedding.weight, std=0.002)
    for layer in model.layers:
        layer.norm_1 = EpsilonNorm(name)
    verify(model, "lns", layout=PLAIN, inputs=TOKENS)


def test_a_tensor_that_the_forward_keeps_is_named_as_the_cause():
    model = PlainModel(Block)
    model.loss = model(TOKENS).sum()
    with pytest.raises(UserError, match=r"PlainModel cannot be copied \(Only Tensors.*: delete what its forward keeps"):
        verify(model, "lns", layout=PLAIN, inputs=TOKENS)


def test_buffers_that_the_trainer_sets_again_pass():
    def reset(model):
        for layer in model.layers:
            layer.number.fill_(layer.layer)

    verify(PlainModel(WipedNumber), "lns", layout=PLAIN, inputs=TOKENS, reset=reset)


def test_sublayers_that_add_the_stream_pass_with_the_branches_inside():
    inside = replace(PLAIN, branches=("attention.dense", "ffn.dense"))
    verify(PlainModel(Adding), "lns", layout=inside, inputs=TOKENS)


def test_hidden_states_in_the_precision_of_the_model_are_inputs():
    model = PlainModel(Block).bfloat16()
    model.embedding = nn.Identity()
    verify(model, "lns", layout=PLAIN, inputs=torch.randn(2, 6, 8, dtype=torch.bfloat16))


def test_blocks_under_activation_checkpointing_pass():
    verify(PlainModel(lambda layer: checkpoint_wrapper(Block(layer))), "lns", layout=PLAIN, inputs=TOKENS)


BROKEN = {
    DeadBranch: "hold: layer 2, attention: gain is 1, expected 0.707107",
    WipedBuffer: "hold after .to.bfloat16.: layer 2, attention: gain is 0.707031, expected 0.707107",
    OffByOne: "hold: layer 2, attention: gain is 1,",
    OnlyAttention: "hold: layer 2, ffn: gain is 1,",
    HalvedBranch: "hold: layer 1, attention: branch_scale is 0.5, expected 1",
    HalvedParallel: "hold: layer 1, ffn: branch_scale is 0.5, expected 1",
    Adding: "branch_scale is no constant factor, expected 1; if its sub-layer adds the stream itself, name the linear",
    LostInTraining: "hold in training mode: layer 2, attention: gain is 1, expected 0.707107",
    ConditionedCube: "hold: layer 1, attention: gain is no constant factor, expected 1",
    LostWhenCompiled: "hold after compilation",
    WipedNumber: "hold after meta initialisation: layer 2, attention: gain is 1, expected 0.707107",
    LostWhenLoaded: "hold after meta initialisation: layer 2, attention: gain is 1, expected 0.707107",
}


@pytest.mark.parametrize("block", BROKEN, ids=lambda block: block.__name__)
def test_a_broken_implementation_is_named_by_its_first_block(block):
    with pytest.raises(UserError, match=BROKEN[block]):
        verify(PlainModel(block), "lns", layout=PLAIN, inputs=TOKENS)


class HalvedFFN(Block):
    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + 0.5 * self.ffn(self.norm_2(x))


def test_the_factors_of_attention_and_ffn_may_differ(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "halved", lambda *_: BlockSpec(SublayerSpec(), SublayerSpec(branch_scale=0.5)))
    scales = [
        f.expected for f in verify(PlainModel(HalvedFFN), "halved", layout=PLAIN, inputs=TOKENS) if f.name != "gain"
    ]
    assert scales == [1, 0.5] * 4


def test_a_buffer_that_is_not_set_again_fails_after_the_meta_device():
    exact = PlainModel(WipedBuffer)
    exact.layers = exact.layers[:1]  # the factor 1 survives bfloat16
    with pytest.raises(UserError, match=r"after meta initialisation: layer 1, attention: gain is 1\.7, expected 1"):
        verify(exact, "lns", layout=PLAIN, inputs=TOKENS)


def test_a_layout_that_names_the_ffn_first_is_refused():
    """`apply` cannot run a model, so it scales the norms of attention for `only_ffn`."""
    swapped = replace(PLAIN, norms=PLAIN.norms[::-1], sublayers=PLAIN.sublayers[::-1])
    model = PlainModel(Block)
    for block in model.layers:
        block.layer = 1  # no factor of its own
    apply(model, "lns", layout=swapped, position="only_ffn")
    with pytest.raises(UserError, match="layer 1, attention: gain is no constant factor, expected 1"):
        verify(model, "lns", layout=swapped, inputs=TOKENS, position="only_ffn")


@pytest.mark.parametrize("norm", ["pre_ln", "lns"])
def test_our_decoder_passes(norm):
    config = DecoderConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    )
    decoder = Decoder(config, build_all({"name": norm}, 3))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    verify(decoder, norm)


@pytest.mark.parametrize(("norm", "set_"), [("post_ln", "pre_norm=False"), ("skip_init", "learned_branch_scale='scal")])
def test_a_strategy_of_our_decoder_that_cannot_be_checked_is_refused_by_its_coefficients(norm, set_):
    with pytest.raises(UserError, match=f"^norm='{norm}' sets {set_}.*which verify cannot check"):
        verify(tiny_decoder(norm), norm)


def quantised():
    return torch.ao.quantization.quantize_dynamic(PlainModel(Block).eval(), {nn.Linear}, dtype=torch.qint8)


NOT_RUN = {
    "on the meta device": (
        lambda: PlainModel(Block).to("meta"),
        TOKENS,
        "PlainModel is on the meta device, or offloaded",
    ),
    "quantised": (quantised, TOKENS, "PlainModel is quantised: dequantise"),
    "tokens in a list": (lambda: PlainModel(Block), [[1, 2]], "inputs is a list: expected a tensor, such as tokens"),
    "tokens outside the vocabulary": (
        lambda: PlainModel(Block),
        TOKENS + 90,
        r"PlainModel cannot be verified on inputs \[1, 12\]: IndexError: index out of range",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", NOT_RUN)
def test_an_unsupported_model_or_input_is_refused(case):
    model, inputs, message = NOT_RUN[case]
    with pytest.raises(UserError, match=message):
        verify(model(), "lns", layout=PLAIN, inputs=inputs)


class BlockOfModules(Block):
    """Calls the layers of its FFN, and not the FFN itself."""

    def __init__(self, layer):
        super().__init__(layer)
        self.ffn = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        x = x + self.attention(self.norm_1(x) * self.factor())
        return x + self.ffn[1](self.ffn[0](self.norm_2(x) * self.factor()))


def test_a_module_that_is_not_called_is_named():
    with pytest.raises(UserError, match=r"layer 1, ffn: its module of layout\.sublayers is not called in the forward"):
        verify(PlainModel(BlockOfModules), "lns", layout=PLAIN, inputs=TOKENS)
    inside = replace(PLAIN, sublayers=("attention", "ffn.0"), branches=("attention", "ffn.1"))
    assert len(verify(PlainModel(BlockOfModules), "lns", layout=inside, inputs=TOKENS)) == 16


def test_an_option_without_a_strategy_is_refused():
    with pytest.raises(UserError, match="position='only_ffn' is an option of a strategy: pass norm= too"):
        verify(apply(PlainModel(Block), "lns", layout=PLAIN, trained="change"), layout=PLAIN, position="only_ffn")


def test_a_sharded_model_is_refused(shard):
    model = PlainModel(Block)
    with pytest.raises(UserError, match="PlainModel is sharded: call verify before fully_shard"):
        verify(shard(model, model.layers), "lns", layout=PLAIN, inputs=TOKENS)


def llama():
    pytest.importorskip("transformers")
    return tiny_llama()


def test_an_applied_llama_passes():
    verify(apply(llama(), "lns"))


def test_random_states_are_restored():
    """Fused attention has dropout in training mode, which drew from the random numbers of the training."""
    model, state = apply(tiny_llama(attention_dropout=0.5, attn_implementation="sdpa"), "lns"), torch.get_rng_state()
    verify(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_family_with_another_eps_passes():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    model = transformers.OlmoForCausalLM(transformers.OlmoConfig(**shape, **heads))
    assert len(verify(apply(model, "lns", trained="change"), "lns")) == 12


@pytest.mark.parametrize("norm", ["scaled_init", "lns_learnable", "lns_as_rates"])
def test_a_strategy_that_no_forward_pass_shows_is_refused(norm):
    with pytest.raises(UserError, match=f"norm='{norm}' sets .*, which verify cannot check"):
        verify(PlainModel(Block), norm, layout=PLAIN, inputs=TOKENS)


def test_branches_that_start_at_zero_pass():
    model = llama()
    for block in model.model.layers:
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    verify(apply(model, "lns"))
    assert not model.model.layers[1].mlp.down_proj.weight.any()


def test_a_checkpoint_loaded_without_apply_is_detected(tmp_path):
    apply(llama(), "lns").save_pretrained(tmp_path)
    loaded = type(llama()).from_pretrained(tmp_path)
    with pytest.raises(UserError, match="layer 2, attention: gain is 1, expected"):
        verify(loaded)


def test_a_folded_model_names_no_strategy():
    with pytest.raises(UserError, match="say which"):
        verify(fold(apply(llama(), "lns")))
