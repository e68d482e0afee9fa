import pytest
import torch

from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import set_step
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all


@pytest.fixture
def shaken():
    """`shaken(model, size)` moves every parameter away from its initial value, such as 0 or 1."""

    def shake(model, size):
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return model

    return shake


@pytest.fixture
def decoder(shaken):
    """`decoder(strategy, **fields)`: a decoder with 101 tokens, 4 blocks of width 48, whose parameters are shaken.

    It is at a step after the end of every schedule.
    """

    def build(strategy="pre_ln", specs=None, **fields):
        shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = DecoderConfig(**(shape | {"vocab_size": 101} | fields))
        options = strategy if isinstance(strategy, dict) else {"name": strategy}
        built = build_decoder(config, specs or build_all(options, config.num_hidden_layers), seed=0)
        set_step(built, 10**6)
        return shaken(built, 0.2).eval()

    return build
