"""Models that a user built: their forward takes tokens, and their modules have names of their own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import VOCABULARY, tokens
from torch import nn

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.open_model import check_layout, find_model
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.reordering import mean_loss

WIDTH = 8
TOKENS = tokens(6, 9)
LAYOUT = cod.Layout(
    "body", norms=("norm_1", "norm_2"), sublayers=("mixer", "ffn"), final_norm="last_norm", head="embedding"
)
WITHOUT_HEAD = cod.Layout("body", norms=LAYOUT.norms, sublayers=LAYOUT.sublayers)


class Mixer(nn.Module):
    """Causal means of projected tokens, in place of an attention."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.projection(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mixer = Mixer()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        x = x + self.mixer(self.norm_1(x))
        return x + self.ffn(self.norm_2(x))


class OwnModel(nn.Module):
    """Its head is its embedding; `answer` makes its output of logits."""

    def __init__(self, answer=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Embedding(12, WIDTH)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.ModuleList(OwnBlock() for _ in range(3))
        self.last_norm = nn.LayerNorm(WIDTH)
        self.answer = answer

    def embed(self, sequences):
        return self.embedding(sequences) + self.positions(torch.arange(sequences.shape[1]))

    def states(self, sequences):
        x = self.embed(sequences)
        return [x, *(x := block(x) for block in self.body)]

    def forward(self, sequences):
        return self.answer(F.linear(self.last_norm(self.states(sequences)[-1]), self.embedding.weight))


ANSWERS = {
    "a tensor": lambda logits: logits,
    "a tuple": lambda logits: (logits, None),
    "an object": lambda logits: SimpleNamespace(loss=None, logits=logits),
    "a dictionary": lambda logits: {"loss": None, "logits": logits},
    "logits of the last token": lambda logits: (logits[:, -1:], None),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_model_may_return_logits_in_many_forms(answer):
    model = ModelAdapter(OwnModel(ANSWERS[answer]), layout=LAYOUT)
    check_layout(model)
    logits = F.linear(model.model.last_norm(model.model.states(TOKENS)[-1]), model.model.embedding.weight)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert mean_loss(model, [TOKENS])[0] == pytest.approx(expected.item())


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_takes_a_layout(name):
    assert getattr(cod.measure, name)(OwnModel(), tokens(16, 9), layout=LAYOUT).series()


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_needs_the_head_only_if_it_reads_a_loss(name):
    measure = getattr(cod.measure, name)
    for layout in (WITHOUT_HEAD, cod.Layout("body", None, LAYOUT.sublayers, head=None)):
        if "why_no_loss" in MEASURES[name].refusals:
            with pytest.raises(UserError, match=r"has no module 'model\.norm', its final_norm: name it|has no head"):
                measure(OwnModel(), TOKENS, layout=layout)
        else:
            assert measure(OwnModel(), TOKENS, layout=layout).series()


def test_a_monitor_measures_the_blocks_of_a_layout():
    model = OwnModel()
    numbers = cod.DepthMonitor(TOKENS, layout=LAYOUT).measure(nn.Sequential(model))
    assert numbers["variance/layer_02"] == pytest.approx(model.states(TOKENS)[2].var(-1).mean().item())
    F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.body[1].parameters()]).norm()
    assert numbers["gradient_norm/layer_02"] == pytest.approx(norm.item())
    with pytest.raises(UserError, match="leave out gradient_norm, because OwnModel has no module"):
        cod.DepthMonitor(TOKENS, layout=WITHOUT_HEAD).measure(model)


def test_a_model_with_known_names_needs_no_layout():
    """The model is like nanoGPT, whose forward has no `input_ids` and gives the logits of the last token."""
    own, known = OwnModel(), nn.Module()
    known.transformer = nn.ModuleDict({"h": nn.ModuleList(nn.Module() for _ in own.body), "ln_f": own.last_norm})
    for block, other in zip(known.transformer.h, own.body, strict=True):
        block.ln_1, block.attn, block.ln_2, block.mlp = other.norm_1, other.mixer, other.norm_2, other.ffn
        block.forward = other.forward
    known.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    known.lm_head.weight = own.embedding.weight

    def forward(idx, targets=None):
        x = own.embed(idx)
        for block in known.transformer.h:
            x = block(x)
        return known.lm_head(known.transformer.ln_f(x[:, -1:])), None

    known.forward = forward
    expected = cod.measure.removal(own, TOKENS, layout=LAYOUT)
    assert cod.measure.removal(known, TOKENS).losses == pytest.approx(expected.losses)


SWAPPED = cod.Layout("body", norms=LAYOUT.norms[::-1], sublayers=LAYOUT.sublayers[::-1], head=None)


class ParallelBlock(OwnBlock):
    """Runs its FFN first, and adds both to the same stream."""

    def forward(self, x):
        ffn = self.ffn(self.norm_2(x))
        return x + self.mixer(self.norm_1(x)) + ffn


@pytest.mark.parametrize("order", [1, -1])
def test_sublayers_that_run_in_parallel_may_be_called_in_either_order(order):
    model = OwnModel()
    model.body = nn.ModuleList(ParallelBlock() for _ in range(2))
    layout = cod.Layout("body", norms=None, sublayers=LAYOUT.sublayers[::order], head=None)
    assert cod.measure.contribution(model, TOKENS, layout=layout).series()


WRONG = {
    "order": (SWAPPED, "block 1 runs 'mixer' before 'ffn', whose output depends on it: name attention first"),
    "blocks": (cod.Layout("bodi", None, LAYOUT.sublayers), "OwnModel has no module 'bodi'"),
    "sub-layers": (cod.Layout("body", None, ("mixer", "norm_2")), "block 1 adds something else"),
    "head": (cod.Layout("body", None, LAYOUT.sublayers, final_norm=None, head="embedding"), "head do not give its log"),
    "type": ("body", "layout='body' is not a Layout"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_layout_that_does_not_hold_is_refused(case):
    layout, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        cod.measure.variance(OwnModel(), TOKENS, layout=layout)


CONTAINERS = {
    "Sequential": lambda blocks: nn.Sequential(*blocks),
    "ModuleDict": lambda blocks: nn.ModuleDict(zip("abc", blocks, strict=True)),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_blocks_may_stand_in_any_container(container):
    model = OwnModel()
    expected = cod.measure.contribution(model, TOKENS, layout=LAYOUT)
    blocks = list(model.body)
    model.body = CONTAINERS[container](blocks)
    whole = container == "Sequential"
    model.states = lambda sequences: [
        x := model.embed(sequences),
        *([model.body(x)] if whole else (x := block(x) for block in blocks)),
    ]
    assert cod.measure.contribution(model, TOKENS, layout=LAYOUT) == expected


@pytest.mark.parametrize("positions", [12, 100])
def test_a_token_without_an_embedding_is_refused_without_a_head(positions):
    model = OwnModel()
    model.positions = nn.Embedding(positions, WIDTH)
    with pytest.raises(UserError, match="token 39 is not in the model's vocabulary of 37"):
        cod.measure.variance(model, torch.full((1, 4), 39), layout=WITHOUT_HEAD)


def test_a_forward_that_passes_keywords_on_gets_none():
    class Passing(OwnModel):
        def forward(self, sequences, **options):
            return super().forward(sequences, **options)

    results = [cod.measure.variance(model, TOKENS, layout=LAYOUT) for model in (Passing(), OwnModel())]
    assert results[0].series() == results[1].series()


def test_a_model_on_the_meta_device_is_refused():
    with pytest.raises(UserError, match="OwnModel is on the meta device: initialise or load the weights first"):
        cod.measure.variance(OwnModel().to("meta"), TOKENS, layout=LAYOUT)


def test_hidden_states_under_another_name_are_refused():
    class Named(OwnModel):
        def states(self, sequences):
            x = self.embed(sequences)
            return [x, *(x := block(x=x) for block in self.body)]

    with pytest.raises(UserError, match="a block is called with x: pass the hidden states first"):
        cod.measure.variance(Named(), TOKENS, layout=LAYOUT)


def test_parts_of_an_unknown_model_are_not_taken_for_one():
    """A ModuleDict has the names of a known backbone, but no forward."""
    model = OwnModel()
    model.parts = nn.ModuleDict({"h": model.body, "ln_f": model.last_norm})
    for block in model.body:
        block.ln_1, block.attn, block.ln_2, block.mlp = block.norm_1, block.mixer, block.norm_2, block.ffn
    with pytest.raises(UserError, match=r"OwnModel has an unknown layout .*layout="):
        cod.measure.variance(model, TOKENS)


def transformers_model(name, kind):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**shape, intermediate_size=24, pad_token_id=0)
    return getattr(transformers, f"{name}{kind}")(config).eval()


@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2", "GPTNeoX"])
def test_a_model_without_a_head_for_tokens_is_measured(name, kind):
    model = transformers_model(name, kind)
    assert cod.measure.variance(model, TOKENS).series()
    assert cod.measure.jacobian(model, TOKENS).series()
    with pytest.raises(UserError, match=r"does not predict|has no head|has no module '(lm_head|embed_out)', its head"):
        cod.measure.removal(model, TOKENS)


def test_a_backbone_inside_an_unknown_module_is_found():
    inner = transformers_model("Llama", "Model")
    assert find_model(nn.Sequential(inner)).model is inner


def test_a_monitor_proves_the_layout_at_every_measurement():
    """Small logits hide that the model caps them."""
    model = OwnModel(torch.tanh)
    nn.init.zeros_(model.embedding.weight)
    monitor = cod.DepthMonitor(probe=TOKENS, measures=["variance"], layout=LAYOUT)
    monitor.measure(model)
    nn.init.normal_(model.embedding.weight, std=3)
    with pytest.raises(UserError, match="its final norm and head do not give its logits"):
        monitor.measure(model)


class SequenceFirst(nn.Module):
    """Its blocks take [length, batch, hidden]."""

    def __init__(self):
        super().__init__()
        self.inner = OwnModel()
        self.body = self.inner.body

    def forward(self, ids):
        x = self.inner.embedding(ids).transpose(0, 1)
        for block in self.body:
            x = block(x)
        return x.transpose(0, 1)


class InPlaceBlock(OwnBlock):
    """Adds the stream onto what its sub-layers return."""

    def forward(self, x):
        h = self.mixer(self.norm_1(x))
        h += x
        y = self.ffn(self.norm_2(h))
        y += h
        return y


def test_blocks_that_add_the_stream_in_place_are_measured():
    plain, in_place = OwnModel(), OwnModel()
    for block in in_place.body:
        block.__class__ = InPlaceBlock
    results = [cod.measure.contribution(model, TOKENS, layout=LAYOUT).rows() for model in (plain, in_place)]
    assert results[0] == results[1]


def test_one_massive_token_does_not_hide_another_equation():
    class Halved(OwnBlock):
        def forward(self, x):
            x = x + 0.5 * self.mixer(self.norm_1(x))
            return x + self.ffn(self.norm_2(x))

    model = OwnModel()
    for block in model.body:
        block.__class__ = Halved
    with torch.no_grad():
        model.embedding.weight[1] *= 1e6
    with pytest.raises(UserError, match="adds something else than its attention and FFN"):
        cod.measure.contribution(model, TOKENS, layout=LAYOUT)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (SequenceFirst(), r"its blocks take hidden states \[5, 1, 8\], expected \[batch, length, hidden\]"),
        (OwnModel(lambda logits: (None, logits)), "its first output is NoneType, expected logits"),
    ],
)
def test_a_model_of_another_form_is_refused(model, problem):
    with pytest.raises(UserError, match=problem):
        cod.measure.variance(model, TOKENS, layout=WITHOUT_HEAD)
