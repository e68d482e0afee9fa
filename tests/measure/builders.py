"""Token batches and models that the tests of measures share."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.layouts import hidden_input, unwrapped, with_hidden
from cod_lightning.nn.strategies import build_all

VOCABULARY, HIDDEN, DEPTH = 37, 16, 4
HF = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo2": "Olmo2", "gpt2": "GPT2"}
HF |= {"qwen2_5_vl": "Qwen2_5_VL", "bert": "Bert"}
"""Names in `transformers`; DeepSeek-LLM is a Llama."""
ALL_FAMILIES = ("ours", "ours-lns", *HF)

FAMILIES = ("ours-lns", "llama", "olmo2", "gpt2")
"""The layouts of causal models: ours, Pre-LN, norms of the branches, and biases with learned positions."""
PAD = 0


def tokens(batch=4, length=9, seed=0):
    """Random tokens without padding [batch, length]."""
    return torch.randint(3, 37, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batches():
    """Two batches of two sequences; the first batch ends in padding."""
    batch = tokens(seed=1)
    batch[::2, 7:] = PAD
    return list(batch.split(2))


def decoder(strategy, depth=DEPTH, name="ours", **options):
    """Our decoder with random blocks that change the residual stream considerably; `options` of the strategy."""
    config = DecoderConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=depth,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        init_std=0.3,
        embedding_std=1.0,
    )
    return ModelAdapter(build_decoder(config, build_all({"name": strategy, **options}, depth), seed=0).eval(), name)


class PlantedModel(nn.Module):
    """Given blocks between an embedding and a head, laid out as in `transformers`."""

    def __init__(self, blocks, width):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=2, intermediate_size=width)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.model = nn.Module()
        self.model.layers, self.model.norm = nn.ModuleList(blocks), nn.Identity()
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids, use_cache):
        x = self.embedding(input_ids)
        for block in self.model.layers:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(x))


def replaced(block, function):
    """Replace the output of a block by `function` of its input, inside a `with` of the returned handle."""

    def hook(module, args, kwargs, y):
        return with_hidden(y, function(hidden_input(args, kwargs)))

    return unwrapped(block).register_forward_hook(hook, with_kwargs=True)


def silence(model, layers):
    """Make blocks add nothing to the residual stream."""
    for layer in layers:
        for name, parameter in model.blocks[layer - 1].named_parameters():
            if {"o_proj", "down_proj", "c_proj"} & set(name.split(".")):
                torch.nn.init.zeros_(parameter)


def learn(model, batch, steps=30):
    """Fit the model to a batch, so that its blocks matter; parameters that are zero stay zero."""
    optimizer = torch.optim.Adam([p for p in model.model.parameters() if p.any()], lr=0.01)
    for _ in range(steps):
        loss = F.cross_entropy(model.logits(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def loss_of_logits(model, batches, pad_id=None):
    """The mean loss of the logits that a model returns."""
    logits = torch.cat([model.logits(batch).flatten(0, 1) for batch in batches])
    return F.cross_entropy(logits, torch.cat([next_tokens(batch, pad_id).flatten() for batch in batches])).item()


@torch.no_grad()
def residual_stream(model, batch):
    """The embedding and the outputs of all blocks [layers + 1, batch, length, hidden], in float64."""
    states = {}
    model.logits(batch, lambda name, layer, x: states.__setitem__((name, layer), x.double()))
    return torch.stack([states["embedding", 0], *(states["residual", layer] for layer in range(1, model.depth + 1))])


TINY = {family: {"head_dim": 4} for family in ("axk1", "deepseek_v3", "youtu")} | {
    "falcon": {"head_dim": ...},
    "gemma2": {"final_logit_softcapping": 0.5},
    "granite": {"residual_multiplier": 0.2, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
}
"""Fields of some families' configurations; `...` leaves one out."""


def tiny_model(family, depth=4, **fields):
    """A random model of `transformers` by its `model_type`; `fields` of its configuration."""
    transformers = pytest.importorskip("transformers")
    shape = {
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": depth, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **{"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"n_embd": 16, "n_layer": depth, "n_head": 2, "n_inner": 24, "n_positions": 64, "rotary_dim": 4},
        **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 24, "intermediate_size_mlp": 24},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    }
    shape |= TINY.get(family, {}) | fields
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**{name: value for name, value in shape.items() if value is not ...})
    return transformers.AutoModelForCausalLM.from_config(config).eval()
