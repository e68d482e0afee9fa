"""Small stock models of two kinds: families of `transformers`, and modules that no layout knows."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils import prune

from cod_lightning.nn.apply import apply
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.layouts import Layout
from cod_lightning.nn.param_groups import param_groups
from cod_lightning.nn.strategies import build_all

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


class PlainBlock(nn.Module):
    """A Pre-LN block whose norms are multiplied by `factor()`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.norm_1, self.attention = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm_2, self.ffn = nn.RMSNorm(8), nn.Linear(8, 8)

    def factor(self):
        return 1.0

    def forward(self, x):
        x = x + self.attention(self.norm_1(x) * self.factor())
        return x + self.ffn(self.norm_2(x) * self.factor())


class PlainModel(nn.Module):
    def __init__(self, block=PlainBlock):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(60, 8)
        self.layers = nn.ModuleList(block(layer) for layer in range(1, 5))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


PLAIN = Layout("layers", norms=("norm_1", "norm_2"), sublayers=("attention", "ffn"), outputs=("attention", "ffn"))


class Outer(nn.Module):
    """Holds a model with a strategy."""

    def __init__(self):
        super().__init__()
        self.core = apply(PlainModel(), "lns", layout=PLAIN)


OUTER = replace(PLAIN, blocks="core.layers")


def decoder_of(norm):
    """An untrained decoder of this package under a strategy."""
    return build_decoder(DecoderConfig(32, 48, 3, 4, vocab_size=60), build_all({"name": norm}, 3), seed=1)


def build(family, **changes):
    """An untrained model of a family of transformers, 3 blocks of 32."""
    import transformers

    names = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}
    shape = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 60} if family == "GPT2" else SHAPE
    if family.startswith(("Gemma", "Qwen3")):
        shape = shape | {"head_dim": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape, pad_token_id=0, **changes)
    return getattr(transformers, names.get(family, f"{family}ForCausalLM"))(config).eval()


def trained_llama():
    model = build("Llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight.uniform_(0.5, 2)
    return model


def scaled_llama():
    model = build("Llama")
    param_groups(model, "lns", lr=1e-3, initial_weights="scale")
    return model


def changed(model, change):
    """A model after `change(block)` of its blocks."""
    for block in model.model.layers:
        change(block)
    return model


def gated_llama():
    """Trained; its attention has a further linear layer that could read the norm."""
    return changed(trained_llama(), lambda block: block.self_attn.add_module("gate_proj", nn.Linear(32, 4)))


def with_child(name, module):
    return lambda block: block.add_module(name, deepcopy(module))


def pruned(part):
    return lambda block: prune.l1_unstructured(block.get_submodule(part), "weight", amount=0.3)


def sharing(part):
    """Gives every block the same weight."""
    weight = build("Llama").model.layers[0].get_submodule(part).weight
    return lambda block: setattr(block.get_submodule(part), "weight", weight)
