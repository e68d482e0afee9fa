import math

import pytest
import torch

from cod_lightning.errors import UserError
from cod_lightning.measure.registry import MEASURES, embedding_variance, measures_of, scaled, shapes
from cod_lightning.measure.result import save


@pytest.mark.parametrize("family", ["ours-lns", "gpt2", "olmo2", "qwen2_5_vl", "bert"])
def test_every_measure_runs_and_is_saved(causal_lm, family, tmp_path):
    model = causal_lm(family)
    batches, calls = [torch.randint(3, 37, (2, 8)) for _ in range(2)], []
    for name, (_, measure) in MEASURES.items():
        result = measure(model, batches, 0, lambda done, total: calls.append((done, total)))
        assert all(path.stat().st_size for path in save(result, tmp_path, name))
        assert result.rows(), name
    assert len(list(tmp_path.iterdir())) == 3 * len(MEASURES)
    assert calls


def test_studies_are_parts_of_all():
    assert measures_of("removal", 16) == ["removal", "run_removal", "swaps", "linear_replacement", "causal"]
    assert measures_of("all", 16) == list(MEASURES)
    assert "jacobian_map" not in measures_of("all", 4096)
    assert measures_of("all", 4096, only=["jacobian_map", "angular"]) == ["jacobian_map", "angular"]
    with pytest.raises(UserError, match="'varianc' is not a study: did you mean 'variance'"):
        measures_of("varianc", 16)
    with pytest.raises(UserError, match="'removl' is not a measure of removal: did you mean 'removal'"):
        measures_of("removal", only=["removl"])


def test_what_the_theory_is_fed_with(causal_lm):
    model, plain = causal_lm("ours-lns"), causal_lm("llama")
    assert (scaled(model), scaled(plain)) == (True, False)
    tokens = torch.randint(3, 37, (3, 6))
    tokens[1, 4:] = 0
    x = plain.model.model.embed_tokens(tokens)[tokens != 0].detach().double()
    assert embedding_variance(plain, [tokens[:2], tokens[2:]], 0) == pytest.approx(float(x.var(-1).mean()), rel=1e-5)
    found = shapes(plain, 6)
    assert (found.hidden, found.intermediate, found.heads, found.length) == (16, 24, 2, 6)
    assert math.isclose(found.std, 0.3, rel_tol=0.05)
