"""Training on images."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run_files import copy_checkpoints, history, losses, newest

from cod_lightning.cli import main
from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import compose
from cod_lightning.config.saved import load_config
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.training import TRAINING_MEASURES, probe_statistics
from cod_lightning.train.loggers import custom_scalars
from cod_lightning.train.run import build_data_and_module
from command_words import TOY_TRAINING, last_of_each

VISION = ("task=vision", "model=vit_tiny", "images.min_crop=1", *TOY_TRAINING)


@pytest.fixture
def train_images(tmp_path):
    return lambda *words: train_run(compose([*VISION, f"output={tmp_path}", *words]))


def restored(folder):
    """The data and the model of a finished run."""
    data, module = build_data_and_module(load_config(folder))
    module.configure_model()
    module.load_state_dict(newest(folder)["state_dict"])
    return data, module


def test_a_run_learns_to_classify_drawn_images(train_images):
    words = ("trainer.max_steps=100", "data.batch_size=32", "data.micro_batch_size=32", "optim.lr=3e-3")
    record, folder = train_images(*words, "eval.every=100", "trainer.stats_every=50", "trainer.checkpoint_every=100")
    assert record["accuracy"] > 30  # chance is 12.5
    assert record["val_images"] == 256
    assert "ppl" not in record
    assert record["tokens"] == 100 * 32 * 16
    assert record["history"]["layers"]["step"] == [0, 50, 100]
    assert all(len(layers) == 4 for layers in record["history"]["layers"]["gradient_norm"])
    assert not (folder / "tokenizer").exists()
    data, module = restored(folder)
    with torch.no_grad():
        samples = [data.val_set[number] for number in range(256)]
        labels = torch.tensor([label for _, label, _ in samples])
        logits = module.vit(torch.stack([image for image, _, _ in samples]))
    assert record["val_loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-5)
    assert record["accuracy"] == pytest.approx(100 * (logits.argmax(-1) == labels).double().mean().item(), rel=1e-6)


def test_the_first_charts_are_loss_and_accuracy():
    config = compose(VISION)
    assert custom_scalars(config.task, config.trainer)["loss"]["accuracy"] == ["Multiline", ["val/accuracy"]]


def test_a_run_resumed_from_its_newest_checkpoint_is_bit_identical(train_images, tmp_path):
    whole, folder = train_images("name=whole", "trainer.keep_last=9")
    copy_checkpoints(folder, tmp_path / "parts", until=2)
    resumed, _ = train_images("name=parts")
    assert history(resumed) == history(whole)
    assert (resumed["accuracy"], resumed["val_loss"]) == (whole["accuracy"], whole["val_loss"])


def test_a_checkpoint_with_other_optimizer_groups_is_refused():
    _, module = build_data_and_module(compose(VISION))
    module.configure_model()
    positions_decayed = [{"param_groups": [{"params": list(range(27))}, {"params": [27]}]}]
    checkpoint = {"state_dict": module.state_dict(), "tokens": 0, "optimizer_states": positions_decayed}
    with pytest.raises(UserError, match=r"optimizer groups of \[27, 1\] parameters.*resume=false"):
        module.on_load_checkpoint(checkpoint)


def test_accumulation_and_weighting_do_not_change_a_step(train_images):
    words = ("trainer.max_steps=3", "trainer.stats_every=0", "eval.every=100")
    first, *others = (
        train_images(*words, f"data.micro_batch_size={size}", f"optim.weighting={weight}", f"name={weight}{size}")[0]
        for size, weight in ((8, "tokens"), (2, "tokens"), (4, "micro_batches"))
    )
    for other in others:
        assert losses(other) == pytest.approx(losses(first), rel=1e-5)
        assert other["val_loss"] == pytest.approx(first["val_loss"], rel=1e-5)


def test_layers_are_measured_over_patches_not_the_class_token(train_images):
    record, folder = train_images("norm=lns", "norm.position=after_branch")
    data, module = restored(folder)
    probe = data.probe_batch(4)
    stream = []
    loss = module.vit(
        probe.pixels, probe.labels, lambda what, layer, x: stream.append(x) if what == "residual" else None
    )
    expected = [x[:, 1:].double().var(-1).mean().item() for x in stream]
    statistics = probe_statistics(module.vit, probe)
    assert statistics.residual == pytest.approx(expected, rel=1e-5)
    assert record["history"]["layers"]["variance"][-1] == pytest.approx(expected, rel=1e-5)
    (loss.total / 4).backward()
    norms = [torch.cat([p.grad.flatten() for p in block.parameters()]).norm().item() for block in module.vit.blocks]
    assert statistics.gradient_norm == pytest.approx(norms, rel=1e-4)


def test_measures_are_taken_of_images(train_images):
    words = ("trainer.measures.angular=2", "trainer.measures.jacobian=2", "trainer.stats_every=0", "eval.every=100")
    record, folder = train_images(*words, "trainer.max_steps=2", "trainer.probe_rows=5", "data.micro_batch_size=2")
    data, module = restored(folder)
    probe = data.probe_batch(5)
    for name, column in (("angular", "distance"), ("jacobian", "frobenius")):
        result = TRAINING_MEASURES[name](ModelAdapter(module.vit), [probe], None, lambda done, total: None)
        series = record["history"][name]
        assert series["step"] == [0, 2]
        assert series[column][-1] == pytest.approx(MEASURES[name].recorded(result)[column], rel=1e-4, nan_ok=True)


def test_a_measure_that_does_not_apply_to_images_is_an_error_of_the_configuration():
    with pytest.raises(UserError, match=r"trainer.measures.theory=10 does not apply to the model: the paper's lemmas"):
        compose([*VISION, "trainer.measures.theory=10"])


def test_table_5_has_the_settings_of_the_paper():
    config = compose(["experiments=table5_vit_s"])
    assert (config.task, config.images.classes, config.images.size, config.images.patch_size) == (
        "vision",
        1000,
        224,
        16,
    )
    assert (config.model.num_hidden_layers, config.model.hidden_size, config.model.num_attention_heads) == (36, 384, 6)
    assert config.trainer.max_steps == 30_000
    rows = {"pre_ln": (67.91, None), "after_ln": (66.43, "after_ln"), "after_branch": (68.75, "after_branch")}
    assert config.paper["rows"].keys() == rows.keys()
    for name, (published, position) in rows.items():
        assert config.paper["rows"][name]["published"] == published
        assert compose(["experiments=table5_vit_s", f"row={name}"]).norm.get("position") == position


@pytest.fixture
def seen(tmp_path):
    """The folder of a run of images of two steps, called seen."""
    words = [*VISION, f"output={tmp_path}", "name=seen", "trainer.max_steps=2", "trainer.progress=true"]
    assert main(["fit", *last_of_each(words)]) == 0
    return tmp_path / "seen"


def test_fit_and_evaluate_print_the_accuracy(capsys, seen):
    printed = capsys.readouterr()
    record = json.loads((seen / "record.json").read_text())
    assert f"{record['accuracy']:.2f}" in printed.out
    assert f"accuracy {record['accuracy']:.2f}" in printed.err
    assert main(["evaluate", str(seen)]) == 0
    figures = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(figures["val_loss"]) == pytest.approx(record["val_loss"], rel=1e-5)
    assert float(figures["accuracy"]) == pytest.approx(record["accuracy"], rel=1e-5)
    assert figures["val_images"] == "256"


def test_commands_of_text_refuse_a_run_of_images(seen, tmp_path, capsys):
    capsys.readouterr()
    for command in (["evaluate", seen, "tasks=piqa"], ["generate", seen, "a"], ["export", seen]):
        assert main([str(word) for word in command]) == 2
        assert capsys.readouterr().err.startswith(f"error: {seen} is a run of task=vision")
    for command in (["evaluate", seen, "data.folder=x"], ["measure", "variance", seen, "data.folder=x"]):
        assert main([str(word) for word in command]) == 2
        assert capsys.readouterr().err.startswith("error: data.folder=x has no effect with task=vision")
    assert main(["fit", f"init_from={seen}"]) == 2
    assert capsys.readouterr().err.endswith(f"error: init_from={seen}: a run of task=vision: name a run of language\n")
    for study, *more in (("theory",), ("prune", "blocks=1", "--output", str(tmp_path / "pruned"))):
        assert main(["measure", study, str(seen), *more]) == 2
        assert capsys.readouterr().err.startswith("error: seen is a model of images: ")
    assert not (tmp_path / "pruned").exists()


def test_images_of_other_classes_are_refused(train_images, tmp_path, capsys):
    for folder, names in (("animals", ("cat", "dog")), ("breeds", ("poodle", "tabby"))):
        for split, name in itertools.product(("train", "val"), names):
            path = tmp_path / folder / split / name
            path.mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(path / "image.png")
    seen = ("images.source=folder", f"images.folder={tmp_path / 'animals'}", "images.size=16", "trainer.probe_rows=2")
    _, run = train_images(*seen, "trainer.max_steps=1")
    assert main(["evaluate", str(run)]) == 0
    capsys.readouterr()
    for command in (["evaluate", str(run)], ["measure", "variance", str(run)]):
        assert main([*command, f"images.folder={tmp_path / 'breeds'}"]) == 2
        assert "breeds has other classes (poodle, tabby) than" in (error := capsys.readouterr().err)
        assert error.endswith("was trained on: use images of cat, dog\n")


def test_a_study_leaves_out_measures_that_images_do_not_have(seen, capsys):
    assert main(["measure", "removal", str(seen), "rows=6", "only=[removal,linear_replacement]"]) == 0
    assert "linear_replacement: left out, " in capsys.readouterr().out
    removal = json.loads((seen / "measure/removal.json").read_text())
    assert (removal["tokens"], len(removal["losses"])) == (6, 4)
    assert not (seen / "measure/linear_replacement.json").exists()
