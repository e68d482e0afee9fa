"""Tiny models with random weights that tests of several rooms share."""

from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def tiny_decoder(norm="lns", depth=3, seed=0, **fields):
    """Our decoder with 37 tokens; `fields` of its configuration."""
    config = DecoderConfig(**(SHAPE | {"num_hidden_layers": depth, "vocab_size": 37} | fields))
    return build_decoder(config, build_all({"name": norm}, depth), seed=seed)


def tiny_llama(depth=3, **fields):
    """A Llama of `transformers` with 32 tokens; `fields` of its configuration."""
    import transformers

    config = transformers.LlamaConfig(**(SHAPE | {"num_hidden_layers": depth, "vocab_size": 32} | fields))
    return transformers.LlamaForCausalLM(config)
