"""Tiny random models of every family that is measured."""

import pytest
import torch
from builders import DEPTH, FAMILIES, HF, HIDDEN, VOCABULARY, decoder

from cod_lightning.measure.adapter import ModelAdapter


@pytest.fixture(scope="session")
def causal_lm():
    """`causal_lm(family)`: a random model whose blocks change the residual stream considerably."""

    def build(family, depth=DEPTH):
        if family.startswith("ours"):
            return decoder("lns" if family.endswith("lns") else "pre_ln", depth, family)
        transformers = pytest.importorskip("transformers")
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 24,
            "num_hidden_layers": depth,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if family == "gpt2":
            shape |= {"n_embd": HIDDEN, "n_layer": depth, "n_head": 2, "n_inner": 24, "n_positions": 64}
        torch.manual_seed(0)
        if family == "qwen2_5_vl":
            # Of a head's 4 pairs of angles 1 is for time, 1 for height and 2 for width; on text all are the same.
            shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            eye = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
            config = transformers.Qwen2_5_VLConfig(text_config=shape, vision_config=eye)
            return ModelAdapter(transformers.Qwen2_5_VLForConditionalGeneration(config).eval(), family)
        if family == "bert_encoder":
            model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False)
            return ModelAdapter(model.eval(), family)
        config = getattr(transformers, f"{HF[family]}Config")(**shape)
        return ModelAdapter(transformers.AutoModelForCausalLM.from_config(config).eval(), family)

    return build


@pytest.fixture(params=FAMILIES)
def model(request, causal_lm):
    return causal_lm(request.param)
