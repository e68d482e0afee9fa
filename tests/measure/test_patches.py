"""Every measure that applies to images, on a Vision Transformer, against the module's own activations."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE
from cod_lightning.measure.ablation import causal_score, removal, swaps
from cod_lightning.measure.activation_stats import activation_stats
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.angular_distances import angular_distance
from cod_lightning.measure.jacobians import jacobian
from cod_lightning.measure.layer_importance import block_influence, layer_importance
from cod_lightning.measure.logit_lens import logit_lens
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.reordering import mean_loss
from cod_lightning.measure.training import probe_statistics
from cod_lightning.measure.weight_sparsity import layer_sparsity
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_model
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import Images, VisionTransformer

DEPTH, CLASSES = 3, 5


def build(strategy):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    config = DecoderConfig(**shape, norm="layer", init_std=0.3)
    specs = build_all({"name": strategy}, DEPTH)
    vit = build_model(lambda: VisionTransformer(config, specs, 12, 4, CLASSES), seed=0)
    return ModelAdapter(vit.double().eval(), "vit")


@pytest.fixture(scope="module")
def model():
    return build("lns")


@pytest.fixture(scope="module")
def images():
    """Five images, one of them without a label, in two batches."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([3, 0, IGNORE, 4, 1])
    whole = Images(torch.randn(5, 3, 12, 12, generator=draw, dtype=torch.float64), labels)
    return [whole[:3], whole[3:]]


def test_images_are_measured_from_python(model, images):
    assert cod.measure.influence(model, images[0]).series()["layer"]


def test_a_model_of_images_refuses_tokens(model):
    with pytest.raises(UserError, match="batches: expected Images, not Tensor: vit is a model of images"):
        cod.measure.influence(model, torch.ones(2, 3, dtype=torch.long))


def labelled(images):
    whole = Images(*(torch.cat([getattr(part, name) for part in images]) for name in ("pixels", "labels")))
    return whole[whole.labels != IGNORE]


def stream(vit, pixels):
    """Embedding and outputs of the blocks, [batch, 1 + patches, hidden] each."""
    x = [vit.embedding(pixels)]
    for block in vit.blocks:
        x.append(block(x[-1], None)[0])
    return x


def loss_of(vit, images):
    return F.cross_entropy(vit(images.pixels), images.labels).item()


@contextmanager
def blocks_of(vit, blocks):
    whole = vit.layers
    vit.layers = torch.nn.ModuleList(blocks)
    yield
    vit.layers = whole


@torch.no_grad()
def test_the_loss_is_that_of_the_labels(model, images):
    assert model.logits(images[0]).shape == (3, 1, CLASSES)
    assert (model.depth, model.hidden) == (DEPTH, 16)
    assert mean_loss(model, images) == (pytest.approx(loss_of(model.model, labelled(images)), rel=1e-12), 4)
    with pytest.raises(UserError, match="no tokens to measure on"):
        mean_loss(model, [images[0][2:3]])


def test_variances_are_those_of_training(model, images):
    result, known = activation_stats(model, images), labelled(images)
    expected = probe_statistics(model.model, known)
    assert result.tokens == 4 * 9
    assert result.residual.variance == pytest.approx(expected.residual, rel=1e-5)
    assert result.ffn.variance == pytest.approx(expected.ffn, rel=1e-5)


@torch.no_grad()
def test_angles_and_influence_are_those_of_the_patches(model, images):
    x = [y[:, 1:].flatten(0, 1) for y in stream(model.model, labelled(images).pixels)]
    cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in pairwise(x)]
    result = angular_distance(model, images)
    assert result.distances[0] == pytest.approx([(c.acos() / torch.pi).mean().item() for c in cosines], rel=1e-6)
    assert block_influence(model, images).influence == pytest.approx([1 - c.mean().item() for c in cosines], rel=1e-6)
    with pytest.raises(UserError, match="token=last does not apply to the patches"):
        angular_distance(model, images, token="last")


@torch.no_grad()
def test_blocks_are_removed_and_exchanged(model, images):
    known, (a, b, c) = labelled(images), model.blocks
    expected = []
    for blocks in ((b, c), (a, c), (a, b), (b, a, c), (a, c, b)):
        with blocks_of(model.model, blocks):
            expected.append(loss_of(model.model, known))
    assert removal(model, images).losses == pytest.approx(expected[:3], rel=1e-12)
    assert swaps(model, images).losses == pytest.approx(expected[3:], rel=1e-12)
    assert model.blocks == [a, b, c]
    effects = causal_score(model, images)
    assert effects.tokens == 4 * 9
    assert all(effect > 0 for row, at in zip(effects.effects, range(DEPTH), strict=True) for effect in row[at + 1 :])


@torch.no_grad()
def test_labels_are_read_from_the_class_token_of_every_layer(model, images):
    known, vit = labelled(images), model.model
    x = [y[:, 0] for y in stream(vit, known.pixels)]
    losses = [F.cross_entropy(vit.head(vit.norm(y)), known.labels).item() for y in x]
    result = logit_lens(model, images)
    assert (result.tokens, result.loss) == (4, pytest.approx(losses[1:], rel=1e-9))
    shares = layer_importance(model, images)
    assert (shares.empty_loss, shares.loss) == (pytest.approx(losses[0]), pytest.approx(losses[-1]))
    assert sum(shares.shapley) == pytest.approx(losses[0] - losses[-1])


def test_jacobians_and_sparsities_are_of_the_patches(model, images):
    assert jacobian(model, images, layers=[1, DEPTH], tokens=2).tokens == 2 * 4
    assert len(layer_sparsity(model, images).rows()) == DEPTH


@pytest.mark.parametrize("strategy", ["x0_mix", "value_residual"])
def test_blocks_that_read_more_than_the_stream_are_refused_for_images_too(images, strategy):
    with pytest.raises(UserError, match="their Jacobians do not multiply"):
        cod.measure.gain(build(strategy), images)


def test_measures_of_tokens_do_not_apply_to_images():
    assert [name for name, measure in MEASURES.items() if measure.not_for_images] == ["linear_replacement", "theory"]
