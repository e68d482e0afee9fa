import subprocess
import sys

import pytest
import torch

from cod_lightning.errors import UserError
from cod_lightning.measure.registry import MEASURES, measures_of, options_for
from cod_lightning.measure.result import save


@pytest.mark.parametrize("family", ["ours-lns", "gpt2", "olmo2", "qwen2_5_vl", "bert"])
def test_every_measure_runs_and_is_saved(causal_lm, family, tmp_path):
    model = causal_lm(family)
    batches, calls = [torch.randint(3, 37, (2, 8)) for _ in range(2)], []
    for name, measure in MEASURES.items():
        result = measure(model, batches, 0, lambda done, total: calls.append((done, total)))
        assert type(result) is measure.result_type
        assert all(path.stat().st_size for path in save(result, tmp_path, name))
        assert result.rows(), name
    assert len(list(tmp_path.iterdir())) == 3 * len(MEASURES)
    assert calls


def test_names_are_known_without_torch():
    code = "import sys; from cod_lightning.measure.registry import MEASURES; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_study_has_its_measures():
    assert measures_of("removal", 16) == ["removal", "run_removal", "swaps", "linear_replacement", "causal"]


def test_all_has_every_measure():
    assert measures_of("all", 16) == list(MEASURES)


def test_whole_jacobians_of_a_large_hidden_size_must_be_selected():
    assert "jacobian_map" not in measures_of("all", 4096)
    assert measures_of("all", 4096, only=["jacobian_map", "angular"]) == ["jacobian_map", "angular"]


def test_an_unknown_study_is_an_error():
    with pytest.raises(UserError, match="'varianc' is not a study: did you mean 'variance'"):
        measures_of("varianc", 16)


def test_an_unknown_measure_of_a_study_is_an_error():
    with pytest.raises(UserError, match="'removl' is not a measure of removal: did you mean 'removal'"):
        measures_of("removal", only=["removl"])


def test_an_option_of_several_studies_is_not_offered():
    assert {"tokens", "probes"} <= options_for(measures_of("jacobian", 16)).keys()
    assert "tokens" not in options_for(MEASURES)


def test_expensive_measures_take_a_few_rows_of_the_first_batch(causal_lm):
    batches = [torch.randint(3, 37, (3, 8)) for _ in range(2)]

    def progress(done, total):
        pass

    assert MEASURES["gain"](causal_lm("ours"), batches, None, progress).sequences == 2
    assert MEASURES["importance"](causal_lm("ours"), batches, None, progress, permutations=1).tokens == 3 * 7
