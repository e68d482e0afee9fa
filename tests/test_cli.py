"""The command line: commands as processes of their own, further calls in this one, and interruptions."""

import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cod_lightning
from cod_lightning.cli import COMMANDS, main
from cod_lightning.commands.experiments import published_figures
from cod_lightning.config.compose import compose
from cod_lightning.config.groups import choices
from cod_lightning.config.saved import load_config
from command_words import last_of_each, run_command, run_python, start_command


def run_ok(*words):
    """Run a command in a process, in which it must succeed; return the process."""
    process = run_command(*words)
    assert process.returncode == 0, process.stderr
    return process


def call(*words):
    """Run a command in this process, which saves 3 s of imports; return its status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(last_of_each(words))
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def call_ok(*words):
    """Run a command in this process, in which it must succeed; return what it printed."""
    done = call(*words)
    assert done.returncode == 0, done.stderr
    return done


def metrics(process):
    """The metrics that `evaluate` printed."""
    return dict(line.split() for line in process.stdout.splitlines())


def record_of(output, *words):
    folder = compose([*words, f"output={output}"]).folder
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The folder of a run that `fit` trained, and the finished process."""
    output = tmp_path_factory.mktemp("finished")
    process = run_ok("fit", *toy, f"output={output}", "trainer.progress=true")
    return compose([*toy, f"output={output}"]).folder, process


def test_a_closed_stderr_does_not_change_the_status():
    words = "[sys.executable, '-m', 'cod_lightning', 'fit', 'nrom=lns']"
    code = f"import os, sys; os.close(2); os.execv(sys.executable, {words})"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 2


@pytest.mark.parametrize(
    ("words", "stream", "status"),
    [
        (["fit", "--cfg"], "stdout", 141),
        (["experiments"], "stdout", 141),
        (["fit", "x=1"], "stderr", 141),
        (["fit", "x=1"], "stdout", 2),
    ],
)
def test_a_reader_that_closes_the_pipe_ends_a_command_without_a_message(words, stream, status):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: closed}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        process = run_command(*words, **streams, env=environment)
    assert process.returncode == status
    assert status == 2 or not (process.stdout or process.stderr)


def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "wb") as stdout:
        process = run_command("fit", "--cfg", stdout=stdout)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"cod_lightning {cod_lightning.__version__}\n"


def test_an_unknown_command_is_an_error_with_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["measur", "variance"])
    assert "'measur' is not a command: did you mean 'measure'?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_script_names_every_command(shell, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)


HELP = """
import contextlib, sys
from cod_lightning.cli import main
for command in ("", *sys.argv[1:]):
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    heavy = {"torch", "hydra", "lightning", "numpy"} & set(sys.modules)
    assert not heavy, f"{command} --help imports {heavy}"
"""


def test_help_does_not_import_torch_or_hydra():
    printed = run_python(HELP, *COMMANDS)
    assert printed.startswith("usage: cod_lightning [-h]")
    for command in COMMANDS:
        assert f"usage: cod_lightning {command} " in printed


def test_experiments_does_not_import_torch():
    code = "import sys; from cod_lightning.cli import main; main(['experiments']); assert 'torch' not in sys.modules"
    run_python(code)


def test_fit_prints_metrics_a_variance_chart_and_the_run_folder(finished):
    folder, process = finished
    record = json.loads((folder / "record.json").read_text())
    for figure in (f"{record['val_loss']:.4f}", f"{record['ppl']:.2f}"):
        assert figure in process.stdout
    assert "variance of the residual stream" in process.stdout
    assert str(folder) in process.stdout
    assert "tokens/s" in process.stderr
    assert "s left" in process.stderr
    assert "Warning" not in process.stderr


def test_fit_shows_a_finished_run_without_retraining(finished, toy):
    folder, first = finished
    changed = (folder / "record.json").stat().st_mtime_ns
    again = call("fit", *toy, f"output={folder.parents[1]}")
    assert again.returncode == 0
    assert "this run is finished" in again.stderr
    assert again.stdout == first.stdout
    assert (folder / "record.json").stat().st_mtime_ns == changed


def test_evaluate_reproduces_the_metrics_of_the_record(finished):
    folder, _ = finished
    record = json.loads((folder / "record.json").read_text())
    figures = metrics(call_ok("evaluate", folder, "protocol=paper"))
    assert float(figures["val_loss"]) == pytest.approx(record["val_loss"], rel=1e-5)
    assert float(figures["ppl_paper_protocol"]) == pytest.approx(record["ppl_paper_protocol"], rel=1e-5)


def test_evaluate_measures_the_loss_on_other_text(finished, corpus, tmp_path):
    folder, _ = finished
    record = json.loads((folder / "record.json").read_text())
    other = tmp_path / "other.txt"
    other.write_text("words that the corpus never had: zebra quartz jackdaw vow sphinx " * 40)
    words = ["data=files", f"data.files={corpus}/*.jsonl", f"data.val_files={other}", f"data.root={tmp_path}"]
    figures = metrics(call_ok("evaluate", folder, *words))
    assert float(figures["val_loss"]) > record["val_loss"] + 0.1
    assert figures.keys() == {"val_loss", "ppl", "val_tokens"}


def test_generate_continues_the_prompt_and_is_deterministic(finished):
    folder, _ = finished
    words = ["generate", folder, "the norm", "--max-tokens", "8", "--top-k", "20"]
    first, again = run_ok(*words), call_ok(*words)
    assert first.stdout.startswith("the norm")
    assert len(first.stdout) > len("the norm\n")
    assert first.stdout == again.stdout


def decoder_of(folder):
    from cod_lightning.train.load import checkpoint_of, load_decoder

    return load_decoder(load_config(folder), folder, checkpoint_of(folder))


def test_a_run_is_exported_for_stock_transformers_and_imported_again(finished, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = finished
    model, imported = tmp_path / "model", tmp_path / "imported"
    process = run_ok("export", folder, "--output", model)
    assert process.stdout.strip() == str(model)
    assert process.stderr == ""
    decoder, tokenizer = decoder_of(folder)
    exported = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.tensor([tokenizer.encode(["the norm of a deep block"])[0]])
    torch.testing.assert_close(exported(tokens).logits, decoder(tokens), rtol=1e-5, atol=1e-5)
    assert exported.config.max_position_embeddings == 32

    again = call("export", folder, "--output", model)
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr

    call_ok("import", model, "--output", imported)
    assert load_config(imported).max_length == load_config(imported).data.seq_len == 32
    words = ["data=files", f"data.files={corpus}/*.jsonl", f"data.root={tmp_path}", "data.seq_len=32"]
    figures = metrics(call_ok("evaluate", imported, *words, "trainer.accelerator=cpu"))
    expected = json.loads((folder / "record.json").read_text())
    assert float(figures["val_loss"]) == pytest.approx(expected["val_loss"], rel=1e-5)
    assert figures["val_tokens"] == f"{expected['val_tokens']:.0f}"
    texts = [call_ok("generate", place, "the norm", "--max-tokens", "6").stdout for place in (folder, imported)]
    assert texts[0] == texts[1] != ""
    assert not list(tmp_path.glob(".*partial"))


def test_measure_gives_the_same_variance_for_a_run_and_its_export(finished, corpus, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    folder, _ = finished
    process = call_ok("measure", "variance", folder, "rows=4")
    assert process.stdout.splitlines()[-1] == str(folder / "measure")
    assert sorted(path.name for path in (folder / "measure").iterdir()) == [
        f"variance.{s}" for s in ("csv", "json", "pdf", "png")
    ]
    model = tmp_path / "model"
    call_ok("export", folder, "--output", model)
    words = ["data=files", f"data.files={corpus}/*.jsonl", "data.seq_len=32", "data.micro_batch_size=4"]
    output = tmp_path / "exported"
    call_ok("measure", "variance", model, "--rows", "4", *words, "trainer.accelerator=cpu", f"output={output}")
    variances = [
        json.loads((place / "variance.json").read_text())["residual"]["variance"]
        for place in (folder / "measure", output)
    ]
    assert variances[0] == pytest.approx(variances[1], rel=1e-5)


def test_measure_accepts_options_as_key_value_words(finished, tmp_path):
    folder, _ = finished
    words = ["token=last", "tokens=3", "normalise=released", "rows=4", f"output={tmp_path / 'angular'}"]
    call_ok("measure", "angular", folder, *words, "data.micro_batch_size=2")
    result = json.loads((tmp_path / "angular/angular.json").read_text())
    assert (result["token"], result["tokens"], result["normalise"]) == ("last", 3, "released")


def loss_of(model, batches, pad_id=None):
    from cod_lightning.measure.adapter import ModelAdapter
    from cod_lightning.measure.reordering import mean_loss

    return mean_loss(ModelAdapter(model), batches, pad_id)[0]


def test_a_pruned_run_loads_in_transformers_with_equal_logits_and_loss(finished, tmp_path):
    transformers = pytest.importorskip("transformers")
    from cod_lightning.commands.measure import subject_opener
    from cod_lightning.measure.block_removal import remove_blocks

    folder, _ = finished
    small = tmp_path / "small"
    process = call_ok("measure", "prune", folder, "layers=2,3", "--rows", "5", "--output", small)
    assert process.stdout.splitlines()[-1] == str(small)
    result = json.loads((small / "prune.json").read_text())
    assert f"{result['loss_after']:.4g}" in process.stdout
    subject = subject_opener(str(folder), [], "last", 5)()
    exported = transformers.AutoModelForCausalLM.from_pretrained(small).eval()
    expected = remove_blocks(subject.model, [2, 3])
    tokens = subject.batches[0]
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, expected.logits(tokens), rtol=1e-5, atol=1e-5)
    assert result["loss_before"] == pytest.approx(loss_of(subject.model.model, subject.batches, subject.pad_id))
    assert result["loss_after"] == pytest.approx(loss_of(exported, subject.batches, subject.pad_id), rel=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    assert tokenizer("the norm").input_ids == decoder_of(folder)[1].encode(["the norm"])[0][:-1]
    names = {path.name for path in small.iterdir()}
    assert {"prune.csv", "prune.png", "model.safetensors", "generation_config.json"} <= names
    again = call("measure", "prune", folder, "by=removal", "blocks=1", f"output={small}")
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr


def test_a_pruned_transformers_model_loads_in_transformers(finished, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    from cod_lightning.commands.measure import subject_opener
    from cod_lightning.nn.huggingface import to_hf_tokenizer

    _, tokenizer = decoder_of(finished[0])
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=1, **shape)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    to_hf_tokenizer(tokenizer, tokenizer.vocab_size, 64).save_pretrained(tmp_path / "gpt2")
    words = ["data=files", f"data.files={corpus}/*.jsonl", "data.seq_len=32", "trainer.accelerator=cpu"]
    chosen = ["sparsity=0.5", "allocation=alpha_pruning", "method=magnitude"]
    call_ok("measure", "prune", tmp_path / "gpt2", *chosen, *words, "rows=4", f"output={tmp_path / 'sparse'}")
    result = json.loads((tmp_path / "sparse/prune.json").read_text())
    assert result["how"] == "magnitude, alpha_pruning"
    assert result["zeros_after"] == pytest.approx(0.5, abs=0.02)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    batches = subject_opener(str(tmp_path / "gpt2"), words, "last", 4)().batches
    assert result["loss_after"] == pytest.approx(loss_of(exported, batches), rel=1e-5)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "sparse")
    assert loaded("the norm").input_ids == tokenizer.encode(["the norm"])[0][:-1]


@pytest.mark.usefixtures("without_images")
def test_measure_compare_writes_one_page_for_two_runs(finished, toy, tmp_path):
    folder, _ = finished
    words = [*toy, f"output={tmp_path}", "norm=pre_ln", "name=plain"]
    call_ok("fit", *words)
    words = ["probes=2", "iterations=1", "--rows", "2", "--output", tmp_path / "page"]
    process = call_ok("measure", "compare", folder, tmp_path / "plain", *words)
    assert process.stdout.strip() == str(tmp_path / "page" / "compare.html")
    page = (tmp_path / "page" / "compare.html").read_text()
    assert "<h1>LNS, seed 1 beside plain</h1>" in page
    assert f"<code>{folder.name}</code>" in page
    assert (tmp_path / "page" / "compare.png").is_file()
    assert json.loads((tmp_path / "page/plain/jacobian.json").read_text())["probes"] == 2


def test_an_imported_model_without_pad_token_can_be_evaluated(finished, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = finished
    _, tokenizer = decoder_of(folder)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    content = json.loads(tokenizer.json.replace("<pad>", "<s>"))  # a BOS where the pad was, as in Llama
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "model/tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    call_ok("import", tmp_path / "model", "--output", tmp_path / "run")
    words = ["data=files", f"data.files={corpus}/*.jsonl", f"data.root={tmp_path}", "data.layout=document"]
    process = call_ok("evaluate", tmp_path / "run", *words, "data.seq_len=32", "data.micro_batch_size=16")
    assert float(metrics(process)["val_loss"]) == pytest.approx(math.log(tokenizer.vocab_size), rel=0.05)


def test_export_and_prune_reject_a_strategy_that_llama_does_not_support(toy, tmp_path):
    words = [*toy, f"output={tmp_path}", "name=peri", "norm=peri_ln", "trainer.max_steps=1", "trainer.stats_every=0"]
    call_ok("fit", *words)
    process = call("export", tmp_path / "peri")
    assert process.returncode == 2
    assert re.findall(r"error: (\w+)=", process.stderr) == ["branch_norm", "entry_norm"]
    assert not (tmp_path / "peri/hf").exists()
    process = call("measure", "prune", tmp_path / "peri", "by=influence", "blocks=1", "--output", tmp_path / "small")
    assert process.returncode == 2
    assert "peri cannot be written as a checkpoint of transformers\nerror: branch_norm=True" in process.stderr
    assert not (tmp_path / "small").exists()


def test_experiments_lists_every_experiment_with_published_figures(capsys):
    assert main(["experiments"]) == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in [*choices("experiments"), "lns 18.20"])


@pytest.mark.parametrize(
    ("published", "shown"),
    [
        (None, []),
        (67.914, ["67.91"]),
        ({"ppl": 25.76}, ["ppl 25.76"]),
        ({"average": 50.0, "piqa": 40.0, "boolq": 60.0}, ["average 50.00"]),
    ],
)
def test_an_average_stands_for_all_published_figures(published, shown):
    assert published_figures(published) == shown


def test_experiments_shows_the_size_of_those_that_are_named(capsys):
    assert main(["experiments", "table1_350m"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("table1_350m", "lns 18.20", "368.0M", "7.86B"))
    assert "table1_1b" not in shown


def test_experiments_takes_a_prefix_as_reproduce_does(capsys):
    assert main(["experiments", "table2"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("table2_250m", "table2_1b"))


def test_prepare_merges_shards_into_the_set_that_prepare_would_write(toy, tmp_path, capfd):
    words = last_of_each(["prepare", *toy, f"data.root={tmp_path}"])
    for shard in ("shard=1/2", "shard=0/2"):
        assert main([*words, shard]) == 0
    assert main([*words, "merge=2"]) == 0
    first, second, folder = capfd.readouterr().out.split()
    assert Path(folder).parent == tmp_path
    assert (Path(folder) / "manifest.json").is_file()
    assert (first, second) == (f"{folder}.parts-2/1", f"{folder}.parts-2/0")
    assert main(words) == 0
    assert capfd.readouterr().out.split() == [folder]


@pytest.mark.usefixtures("commands_in_process")
def test_a_sweep_trains_every_combination_and_prints_them_by_loss(toy, tmp_path):
    process = call_ok("fit", "-m", *toy, f"output={tmp_path}", "norm=pre_ln,lns", "trainer.max_steps=2")
    table = process.stdout.partition("runs by validation loss")[2]
    losses = {}
    for norm in ("pre_ln", "lns"):
        record = record_of(tmp_path, *toy, f"norm={norm}", "trainer.max_steps=2")
        losses[f"norm={norm}"] = record["val_loss"]
        assert f"{record['val_loss']:.4f}" in table
    order = sorted(losses, key=losses.__getitem__)
    assert table.index(order[0]) < table.index(order[1])


def test_a_run_killed_twice_resumes_bit_identically(toy, tmp_path, wait_for):
    words = [*toy, "trainer.max_steps=60", "trainer.checkpoint_every=4", "trainer.stats_every=5", "eval.every=6"]
    call_ok("fit", *words, f"output={tmp_path / 'whole'}")
    folder = compose([*words, f"output={tmp_path / 'killed'}"]).folder
    kept = folder / "checkpoints"
    # While a checkpoint is being written, and around a validation (steps 6, 12, ...).
    for moment in (".step-000000*.partial", "step-00000024.ckpt"):
        process = start_command("fit", *words, f"output={tmp_path / 'killed'}")
        wait_for(lambda moment=moment: any(kept.glob(moment)), process)
        process.kill()
        process.wait()
        assert not (folder / "record.json").exists()
    call_ok("fit", *words, f"output={tmp_path / 'killed'}")
    expected, result = (record_of(tmp_path / name, *words) for name in ("whole", "killed"))
    for kind in ("train", "val", "layers"):
        for name, values in expected["history"][kind].items():
            if name != "tokens_per_second":
                assert result["history"][kind][name] == values, (kind, name)
    for name in ("val_loss", "ppl", "ppl_paper_protocol", "tokens"):
        assert result[name] == expected[name]
    assert not list(kept.glob(".*partial"))


@pytest.mark.usefixtures("default_handlers")
def test_ctrl_c_exits_with_130_and_says_how_to_resume(toy, tmp_path, send_signals):
    send_signals(signal.SIGINT)
    process = call("fit", *toy, f"output={tmp_path}", "name=stopped", "eval.every=100")
    assert process.returncode == 130, process.stderr
    assert process.stderr.endswith("interrupted at step 4; checkpoint saved\nrun the same command again to resume\n")
    assert "Traceback" not in process.stderr
    assert (tmp_path / "stopped/checkpoints/step-00000004.ckpt").is_file()


def test_options_may_precede_or_follow_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = call("fit", "seed=3", "--cfg", "norm=pre_ln")
    assert "seed: 3" in process.stdout
    assert "name: pre_ln" in process.stdout
    process = call("fit", "norm=pre_ln,lns", "-m", "--cfg", "seed=1,2")
    assert process.stdout.count("---\n") == 3
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "seed=3", "--nonsense"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_earlier_checkpoints_and_the_run_resumes(toy, tmp_path):
    words = [*toy, "name=full", f"output={tmp_path}", "trainer.max_steps=40", "trainer.checkpoint_every=2"]
    words += ["eval.every=1000", "trainer.log_every=1", "trainer.stats_every=0"]
    call_ok("fit", *words[:-3], "trainer.max_steps=2", "name=size", "eval.every=1000", "trainer.stats_every=0")
    size = (tmp_path / "size" / "checkpoints" / "step-00000002.ckpt").stat().st_size
    # The history in a checkpoint grows with the steps, so that a later one no longer fits.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 512, hard))
    try:
        process = call("fit", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert process.returncode == 2, process.stderr
    assert re.search(
        r"error: \S+step-\d+\.ckpt: the checkpoint cannot be written \(.*\); earlier ones are kept", process.stderr
    )
    kept = sorted((tmp_path / "full" / "checkpoints").iterdir())
    assert kept
    assert all(path.name.startswith("step-") for path in kept)
    (failure := tmp_path / "full" / "failed.json").write_text("{}")  # of an attempt that diverged
    call_ok("fit", *words)
    assert json.loads((tmp_path / "full" / "record.json").read_text())["steps"] == 40
    assert not failure.exists()


def test_divergence_exits_with_2_and_keeps_the_checkpoint(toy, tmp_path):
    words = [*toy, f"output={tmp_path}", "name=diverges", "optim.lr=1e18", "optim.warmup_ratio=0.5"]
    process = call("fit", *words, "trainer.max_steps=40", "trainer.checkpoint_every=1", "eval.every=100")
    assert process.returncode == 2, process.stderr
    assert re.search(
        r"error: the (loss is (nan|inf)|gradient is not finite) at step \d+.* (layer|lm_head|embed)", process.stderr
    )
    assert list((tmp_path / "diverges" / "checkpoints").glob("step-*.ckpt"))
    assert "Traceback" not in process.stderr
    failure = json.loads((tmp_path / "diverges" / "failed.json").read_text())
    assert f"error: {failure['failure']}\n" in process.stderr


def test_no_escape_codes_are_printed_without_a_terminal(finished):
    assert "\x1b" not in finished[1].stdout + finished[1].stderr
