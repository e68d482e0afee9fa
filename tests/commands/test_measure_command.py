"""Where the command `measure` writes."""

import pytest

from cod_lightning.commands import measure, measure_report, measure_runner


@pytest.mark.parametrize(("checkpoint", "suffix"), [("last", ""), ("best", "_best")])
def test_results_of_the_best_checkpoint_have_a_folder_of_their_own(checkpoint, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    folders = []
    monkeypatch.setattr(measure, "subject_opener", lambda *_, **__: lambda: None)
    monkeypatch.setattr(measure_runner, "run_study", lambda *arguments: folders.append(str(arguments[-1])))
    monkeypatch.setattr(measure_report, "run_report", lambda *arguments: folders.append(str(arguments[2])))
    for study in ("variance", "report"):
        measure.run(study, ["run"], checkpoint=checkpoint, trust_code=False, rows=None, output=None)
    assert folders == [f"run/measure{suffix}", f"measure/report-run{suffix}"]
