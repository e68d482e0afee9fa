"""The depth report of tiny models in this process."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from cod_lightning.commands import measure_report
from cod_lightning.commands.measure_report import head_share, measure_parts, print_plan, run_report
from cod_lightning.commands.measure_runner import Subject
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.depth_report import COMPARED, REPORTED, SECTIONS
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import Images, VisionTransformer
from tiny_models import tiny_decoder


def subject(norm="lns", depth=3, seed=0):
    model = tiny_decoder(norm, depth, seed).eval()
    tokens = torch.randint(3, 37, (4, 10), generator=torch.Generator().manual_seed(0))
    return Subject(ModelAdapter(model, norm), [tokens], None, export=print, text="files: a|b.txt", config=norm)


SHOWN = ("variance", "angular", "removal", "longest_run")


@pytest.fixture
def measured(without_images, monkeypatch):
    """Names of the measures that run, in order."""
    names = []

    def with_progress(name, *args, **others):
        names.append(name)
        return original(name, *args, **others)

    original = measure_report.with_progress
    monkeypatch.setattr(measure_report, "with_progress", with_progress)
    return names


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run_report({"lns": subject, "deep": lambda: subject("pre_ln", 4)}, {}, folder, SHOWN)
    return folder


def test_the_page_of_two_models_needs_no_other_file(report):
    page = (report / "report.html").read_text()
    assert "<h1>lns beside deep</h1>" in page
    assert len(re.findall(r'<img src="data:image/png;base64,[A-Za-z0-9+/=]+"', page)) == len(SHOWN) + 1
    assert not re.search(r'(src|href)="http', page)
    assert "of 3 blocks cost less than 1% of the loss" in page
    assert "of 4 blocks cost less than 1% of the loss" in page


def test_the_headline_and_the_text_are_in_the_json_file(report):
    models = json.loads((report / "report.json").read_text())["models"]
    assert [models[name]["blocks"] for name in ("lns", "deep")] == [3, 4]
    assert models["deep"]["longest_runs"].keys() == {"1", "5", "10"}
    assert (models["lns"]["text"]["sequences"], models["lns"]["text"]["tokens"]) == (4, 40)
    assert models["lns"]["uniform_loss"] == pytest.approx(math.log(37))
    assert models["lns"]["text"]["source"] == "files: a|b.txt"


def test_every_result_and_figure_is_saved(report):
    assert {path.stem for path in (report / "deep").glob("*.csv")} == set(SHOWN)
    for suffix, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert all((report / f"report-{name}.{suffix}").read_bytes().startswith(start) for name in SHOWN)


def test_a_stopped_report_measures_only_what_is_missing(measured, tmp_path, monkeypatch):
    parts = ("variance", "removal", "longest_run", "influence")
    with monkeypatch.context() as patch:
        patch.setattr(measure_report, "first_sequences", lambda batches, number: iter(()) if measured else batches)
        with pytest.raises(UserError, match="no tokens to measure on"):
            measure_parts(subject(), {}, tmp_path, parts)
    assert measured == ["variance", "removal"]
    del measured[:]
    results = measure_parts(subject(), {}, tmp_path, parts)
    assert measured == ["removal", "longest_run", "influence"]
    del measured[:]
    assert measure_parts(subject(), {}, tmp_path, parts) == results
    assert not measured


CHANGES = {
    "weights": (lambda: subject(seed=1), {"longest": 2}),
    "configuration": (lambda: replace(subject(), config="other"), {"longest": 2}),
    "text": (lambda: replace(subject(), batches=[torch.full((4, 10), 5)]), {"longest": 2}),
    "padding": (lambda: replace(subject(), pad_id=3), {"longest": 2}),
    "options": (subject, {"longest": 1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_of_anything_else_is_measured_again(measured, tmp_path, change):
    measure_parts(subject(), {"longest": 2}, tmp_path, ["influence"])
    open_subject, options = CHANGES[change]
    measure_parts(open_subject(), options, tmp_path, ["influence"])
    assert measured == ["influence"] * 2


def test_a_result_that_another_command_replaced_is_measured_again(measured, tmp_path):
    measure_parts(subject(), {}, tmp_path, ["removal"])
    (tmp_path / "removal.json").write_text("{}")
    measure_parts(subject(), {}, tmp_path, ["removal"])
    assert measured == ["removal"] * 2


def test_the_plan_comes_before_the_first_part(measured, tmp_path, capsys):
    measure_parts(subject(), {}, tmp_path, ("variance", "removal"))
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"lns: a forward pass over 4 sequences takes \S+ s", lines[0])
    assert re.fullmatch(r"  removal +\d+\.\d passes  0 s", lines[2])
    assert lines[3].endswith("if stopped, the same command resumes")
    assert lines[4].startswith("lns: variance done in")


def test_the_plan_counts_the_sequences_of_each_part(capsys, monkeypatch):
    jacobian = replace(SECTIONS["jacobian"], passes=lambda *_: 20, sequences=8)
    variance = replace(SECTIONS["variance"], passes=lambda depth, head: depth / 2)
    monkeypatch.setattr(measure_report, "SECTIONS", {"jacobian": jacobian, "variance": variance})
    few = subject()
    many = replace(few, batches=[*few.batches] * 4)  # 16 sequences, of which the Jacobians read 8
    print_plan(many, ("jacobian", "influence", "variance"), ("jacobian", "variance"))
    costs = dict(re.findall(r"^  (\w+) +(measured before|[\d.]+ passes)", capsys.readouterr().err, re.MULTILINE))
    expected = {"jacobian": "10.0 passes", "influence": "measured before", "variance": "1.5 passes"}
    assert costs == expected | {"all": "11.5 passes"}


def test_the_share_of_the_head_is_that_of_its_parameters():
    # head 37 x 16; block 4 x 16 x 16 + 3 x 16 x 24 + 2 x 16
    assert head_share(subject().model) == 592 / (592 + 3 * 2208)


@pytest.mark.parametrize(("name", "measures"), [("report", REPORTED), ("compare", COMPARED)])
def test_all_measures_of_a_page_are_taken(measured, tmp_path, name, measures):
    page = run_report({"lns": subject, "pre_ln": lambda: subject("pre_ln", 2)}, {"probes": 2}, tmp_path, measures, name)
    assert page == tmp_path / f"{name}.html"
    assert measured == [*measures, *measures]
    assert json.loads((tmp_path / "pre_ln/jacobian.json").read_text())["probes"] == 2


def test_too_few_tokens_are_refused_before_the_first_measure(measured, tmp_path):
    def short():
        whole = subject()
        return replace(whole, batches=[batch[:1, :8] for batch in whole.batches[:1]])

    with pytest.raises(UserError, match=r"lns: linear_replacement: it needs more tokens than the hidden size"):
        run_report({"lns": short}, {}, tmp_path, COMPARED, "compare")
    assert measured == []


def test_every_model_is_checked_before_the_first_is_measured(measured, tmp_path):
    def damaged():
        raise UserError("deep: damaged")

    with pytest.raises(UserError, match="deep: damaged"):
        run_report({"lns": subject, "deep": damaged}, {}, tmp_path, REPORTED)
    assert measured == []


def test_models_of_images_have_no_report(tmp_path):
    vit = VisionTransformer(tiny_decoder().config, build_all("lns", 3), image_size=8, patch_size=4, classes=5)
    images = Subject(ModelAdapter(vit, "vit"), [Images(torch.zeros(1, 3, 8, 8), torch.tensor([1]))], None, export=None)
    with pytest.raises(UserError, match="vit is a model of images: measure report supports models of text only"):
        run_report({"vit": lambda: images}, {}, tmp_path, REPORTED)
    assert not list(tmp_path.iterdir())
