"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_lightning.errors import TRY_AGAIN, Diverged, Stopped, UserError, first_line, nearest
from cod_lightning.train.ranks import check_ranks, is_first_on_node, is_first_rank

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config

OVERRIDES = """\
Overrides are Hydra's: group=choice (experiments, model, norm, data, optim, protocol, trainer, logger) or
section.field=value. Examples:
  fit experiments=table1_350m norm=mix_ln
  fit norm=pre_ln seed=2 trainer.max_steps=100 output=/scratch/runs
  fit -m norm=pre_ln,lns seed=1,2
  fit data=files 'data.files=texts/*.json.gz' norm=my_package.my_module:my_strategy
"""

MEASURE = """\
Writes a JSON, a CSV and a PNG file for every measure. Words of the form option=value are options of the study's
measures, all other key=value overrides, which choose the text and its rows:
  measure variance runs/quickstart/lns-seed1-...
  measure angular meta-llama/Llama-2-7b-hf tokens=262144 rows=2048 data=files 'data.files=texts/*.json.gz'
  measure jacobian runs/quickstart/lns-seed1-... probes=32 layers=1,12,24
  measure all runs/quickstart/lns-seed1-... only=angular,swaps
  measure compare runs/quickstart/pre_ln-seed1-... runs/quickstart/lns-seed1-...

prune writes a model that stock transformers loads, without some blocks or weights, and its loss before and after:
  measure prune RUN layers=17,18,19 --output FOLDER
  measure prune RUN by=influence blocks=4 --output FOLDER         (or by=streamline, by=removal)
  measure prune RUN sparsity=0.5 allocation=owl method=wanda --output FOLDER
                                                 (or allocation=alpha_pruning, uniform; method=magnitude)
"""

PREPARE = """\
Several machines prepare a share of the files each, in any order; the merge then makes the very set that one machine
would make. Shards are numbered from 0; one that is finished, or killed, can be started again:
  prepare OVERRIDES shard=0/64     ...     prepare OVERRIDES shard=63/64
  prepare OVERRIDES merge=64
"""

ESTIMATE = """\
Beside overrides it takes hardware=a100|h100|h200|cpu (default: h100), mfu=, gpus=, strategy=single|ddp|fsdp and
checkpointing=none|selective|full; several values make several columns. Examples:
  estimate experiments=table1_350m norm=lns gpus=4
  estimate experiments=table1_130m,table1_1b hardware=a100,h200 mfu=0.35 trainer.precision=bf16-mixed
  estimate experiments=quickstart hardware=cpu --json
"""

ESTIMATE_SETTINGS = {"hardware": str, "mfu": float, "gpus": int, "strategy": str, "checkpointing": str}
"""Words of `estimate` that are no overrides, and their types."""


LAUNCH = """\
Examples:
  launch slurm experiments=table1_350m trainer=ddp trainer.devices=4                        # one node, printed
  launch slurm experiments=table1_1b trainer=fsdp trainer.devices=8 trainer.num_nodes=4 --time 12:00:00 --submit
The run's folder must be on a file system that all nodes share. Prepare its data first: see prepare.
"""

REPRODUCE = """\
Examples:
  reproduce table1_350m                                 # every row at the paper's size
  reproduce table1 table6 scale=toy seeds=3 -j 2        # a small stand-in, on two cores
  reproduce figure7 scale=toy seeds=3                   # the same runs, measured
  reproduce table8 row=lns,before_ln scale=toy          # some rows alone
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cod_lightning",
        description="Train, evaluate and compare decoders under the norm strategies of The Curse of Depth.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, help: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def add_overrides(to: argparse.ArgumentParser) -> None:
        to.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")

    fit = command("fit", "Train a run to its end, going on where it was stopped; prepares its data first.", OVERRIDES)
    fit.add_argument("-m", "--multirun", action="store_true", help="sweep over comma-separated values")
    fit.add_argument("-j", "--jobs", type=int, default=1, help="runs of a sweep side by side (default: 1)")
    fit.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    add_overrides(fit)

    prepare = command("prepare", "Tokenize the data of a run into litdata chunks.", f"{OVERRIDES}\n{PREPARE}")
    add_overrides(prepare)

    evaluate = command(
        "evaluate",
        "Validate a checkpoint again, on the run's data or on other data; or, with tasks=a,b,c, score it on tasks of "
        "lm-evaluation-harness (tasks=paper: those of Table 2).",
    )
    evaluate.add_argument("run", type=Path, help="run folder")
    evaluate.add_argument("--checkpoint", choices=("last", "best"), default="last")
    evaluate.add_argument("--task-folder", type=Path, help="with tasks=: folder with tasks of one's own, as YAML")
    evaluate.add_argument("--limit", type=int, help="with tasks=: examples of each task at the most")
    add_overrides(evaluate)

    generate = command("generate", "Continue a text with a trained run.")
    generate.add_argument("run", type=Path, help="run folder")
    generate.add_argument("prompt", help="text to continue")
    generate.add_argument("--checkpoint", choices=("last", "best"), default="last")
    generate.add_argument("--max-tokens", type=int, default=100)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    generate.add_argument("--top-k", type=int, default=None)
    generate.add_argument("--seed", type=int, default=0)

    export = command("export", "Write a run as a model that stock transformers loads.")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("--to", choices=("hf",), default="hf", help="format: Hugging Face (default)")
    export.add_argument("--output", type=Path, help="new folder (default: hf, inside the run folder)")
    export.add_argument("--checkpoint", choices=("last", "best"), default="last")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    export.add_argument("--max-length", type=int, help="max_position_embeddings (default: the run's data.seq_len)")

    consolidate = command("consolidate", "Write a sharded checkpoint of a run as one file.")
    consolidate.add_argument("run", type=Path, help="run folder")
    consolidate.add_argument("--checkpoint", choices=("last", "best"), default="last")
    consolidate.add_argument("--output", type=Path, help="new .ckpt file (default: whole-STEP.ckpt in checkpoints/)")

    take = command("import", "Make a run folder of a Llama, Mistral or Qwen2 checkpoint, for evaluate and generate.")
    take.add_argument("model", help="folder of the checkpoint, or its name on the hub")
    take.add_argument("--output", type=Path, required=True, help="new run folder")

    measure = command(
        "measure",
        "Measure the layers of a run, or of a causal language model of transformers; compare puts runs side by side, "
        "prune writes one with less in it.",
        MEASURE,
    )
    measure.add_argument(
        "study", help="variance, jacobian, angular, removal, influence, theory, all, compare, or prune"
    )
    measure.add_argument("words", nargs="+", metavar="model|key=value", help="run folder, model folder or hub name")
    measure.add_argument("--checkpoint", choices=("last", "best"), default="last")
    measure.add_argument("--rows", type=int, default=32, help="held-out rows to measure on (default: 32)")
    measure.add_argument("--output", type=Path, help="folder (default: measure, inside the run folder or here)")

    estimate = command("estimate", "Say what a run will need: parameters, memory, data, hours.", ESTIMATE)
    estimate.add_argument("--json", dest="as_json", action="store_true", help="print a JSON list, an entry for a run")
    add_overrides(estimate)

    launch = command(
        "launch",
        "Print, write or submit a job script that carries out a run and queues it again until its end.",
        LAUNCH,
    )
    launch.add_argument("scheduler", choices=("slurm",))
    launch.add_argument("--time", default="24:00:00", help="limit of the job (default: 24:00:00)")
    launch.add_argument("--grace", type=int, default=300, help="seconds to save in before the limit (default: 300)")
    for name in ("partition", "account", "qos", "constraint", "cpus-per-task", "mem"):
        launch.add_argument(f"--{name}", help="as for sbatch")
    launch.add_argument("--output", type=Path, help="new file for the script (default: print it)")
    launch.add_argument("--submit", action="store_true", help="give it to sbatch")
    add_overrides(launch)

    reproduce = command(
        "reproduce",
        "Carry out every row of some experiments, going on where it was stopped, and show them beside the paper's.",
        REPRODUCE,
    )
    reproduce.add_argument("words", nargs="+", metavar="experiment|key=value", help="such as table1 scale=toy seeds=3")
    reproduce.add_argument("-j", "--jobs", type=int, default=1, help="runs side by side (default: 1)")
    reproduce.add_argument("--results", type=Path, help="where records are kept (default: experiments/results)")

    report = command(
        "report", "Write REPRODUCTION.md, a page of HTML, CSV and figures of all that the paper claims and runs showed."
    )
    report.add_argument("--results", type=Path, help="where records are kept (default: experiments/results)")
    report.add_argument("--output", type=Path, default=Path(), help="top of the files (default: here)")

    command("experiments", "List the experiments: size, tokens, what they reproduce, published figures.")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for input that can be corrected, `TRY_AGAIN` for a stopped run."""
    # libgomp's threads spin while they wait for each other. With another process on the cores that made a step 18
    # times slower (2 threads, 2 cores); with this bound it is 2 to 3 times, and as fast as before on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    top = parser()
    known, rest = top.parse_known_args(argv)
    arguments = vars(known)
    several = next((name for name in ("overrides", "words") if name in arguments), None)
    if any(word.startswith("-") for word in rest) or (rest and several is None):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if several is not None:  # what follows an option, as in `fit norm=lns -m seed=1,2`
        arguments[several] = [*arguments[several], *rest]
    command = arguments.pop("command")
    try:
        return {
            "fit": fit,
            "prepare": prepare,
            "evaluate": evaluate,
            "generate": generate,
            "export": export,
            "consolidate": consolidate,
            "import": import_model,
            "measure": measure,
            "estimate": estimate,
            "launch": launch,
            "reproduce": reproduce,
            "report": report,
            "experiments": experiments,
        }[command](**arguments)
    except (UserError, OSError) as error:  # a file or folder that cannot be read or written names itself
        named = isinstance(error, OSError) and error.filename is not None
        for line in (f"{error.filename}: {error.strerror}" if named else str(error)).splitlines():
            sys.stderr.write(f"error: {line}\n")  # in one piece, as other ranks may write theirs
        return 2
    except Stopped as reason:
        print(f"{reason}\nrun the same command again to go on", file=sys.stderr)
        # Lightning kills this process where one that it launched reports a failure; they all stop, and this one tells.
        return TRY_AGAIN if is_first_on_node() else 0
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130


def fit(overrides: Sequence[str], multirun: bool, jobs: int, cfg: bool) -> int:
    from cod_lightning.config.compose import compose, row_of, sweep
    from cod_lightning.config.saved import to_yaml

    if jobs < 1:
        raise UserError(f"--jobs={jobs} must be at least 1")
    if not multirun and jobs > 1:
        raise UserError(f"--jobs={jobs} is for a sweep: add -m")
    if cfg:
        runs = sweep(overrides) if multirun else [overrides]
        print("---\n".join(to_yaml(compose(words)) for words in runs), end="")
        return 0
    if multirun:
        return fit_all(overrides, jobs)
    config = compose(overrides)
    config.row = row_of(config)
    record, folder = carry_out(config)
    if is_first_rank():
        from cod_lightning.commands.terminal import show, summary

        show(summary(record, folder))
    return 0


def carry_out(config: Config) -> tuple[dict[str, Any], Path]:
    """Train a run unless it is finished; returns its record and folder. Nothing is written before all is checked.

    Raises:
        UserError: the run's folder is another run's or in use, or as `train.run.fit`.
    """
    from filelock import FileLock, Timeout

    from cod_lightning.config.saved import check_folder, check_init_from, create_run_folder
    from cod_lightning.nn.strategies import build_all, warnings

    check_ranks(config.trainer)
    folder = check_folder(config)
    first = is_first_rank()
    if first:
        print(f"{config.experiment}: {config.description}\nrun folder: {folder}", file=sys.stderr)
        for warning in warnings(build_all(config.norm, config.model.num_hidden_layers)):
            print(f"warning: {warning}", file=sys.stderr)
    from cod_lightning._torchmetrics import import_without_unused

    import_without_unused()
    from cod_lightning.train.record import read_record, write_failure
    from cod_lightning.train.run import fit

    if config.resume and (finished := read_record(folder)) is not None:
        if first:
            print("this run is finished; resume=false trains it anew", file=sys.stderr)
        return finished, folder
    check_init_from(config)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        if first:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        return fit(config, folder, lambda: create_run_folder(config) if first else folder), folder
    except Diverged as error:
        if first:
            write_failure(folder, asdict(config), str(error))
        raise
    except Timeout:
        raise UserError(f"{folder} is being trained by another process: wait for it, or choose another name=") from None
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"the memory does not suffice ({first_line(error)}): lower data.micro_batch_size, or the model; "
            "`estimate` with the same words says what a run takes"
        ) from error
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit of its own.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    finally:
        lock.release()


def fit_all(overrides: Sequence[str], jobs: int) -> int:
    """Every run of a sweep in a process of its own, then a table that compares them."""
    from cod_lightning.config.compose import compose, sweep

    runs = list(sweep(overrides))
    configs = [compose(words) for words in runs]
    if len({config.folder for config in configs}) < len(configs):
        raise UserError("two runs of the sweep would be the same run: vary something that changes what is computed")
    labels = varied(runs)
    with ThreadPoolExecutor(jobs) as pool:
        statuses = list(pool.map(lambda words, label: run_marked(["fit", *words], label, jobs), runs, labels))

    from cod_lightning.commands.terminal import comparison, show
    from cod_lightning.train.record import read_record

    show(
        comparison(
            [
                (label, read_record(config.folder) if status == 0 else None)
                for label, config, status in zip(labels, configs, statuses, strict=True)
            ]
        )
    )
    return max(statuses, key=abs)


def varied(runs: Sequence[Sequence[str]]) -> list[str]:
    """For each run of a sweep the words that others do not share."""
    fixed = set.intersection(*(set(words) for words in runs))
    return [" ".join(word for word in words if word not in fixed) or "the run" for words in runs]


def run_marked(words: Sequence[str], label: str, jobs: int) -> int:
    """Run a command; side by side with others, its lines are marked and it takes its share of the cores."""
    command = [sys.executable, "-m", "cod_lightning", *words]
    if jobs == 1:
        print(f"--- {label}", file=sys.stderr, flush=True)
        return subprocess.run(command).returncode
    share = str(max((os.cpu_count() or 1) // jobs, 1))
    process = subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": share} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{label}] {line}", end="", file=sys.stderr, flush=True)
    return process.wait()


def prepare(overrides: Sequence[str]) -> int:
    from cod_lightning.config.compose import compose
    from cod_lightning.data import shards
    from cod_lightning.data.prepare import prepare as prepare_data

    shard, overrides = taken("shard", overrides)
    merge, overrides = taken("merge", overrides)
    if shard is not None and merge is not None:
        raise UserError(f"shard={shard} and merge={merge}: the merge comes when all shards are finished")
    share = None if shard is None else shards.shard_of(shard)
    count = None if merge is None else shards.count_of(merge)
    config = compose(overrides)
    if config.task != "language":
        raise UserError(f"task={config.task} needs no preparation: images are read as they are")
    if share is not None:
        print(shards.prepare_shard(config.data, *share))
    elif count is not None:
        print(shards.merge_shards(config.data, count))
    else:
        print(prepare_data(config.data))
    return 0


def taken(name: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of the first word `name=`, None without one, and the words without it: it is no override."""
    value = next((word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")), None)
    return value, [word for word in words if not word.startswith(f"{name}=")]


def evaluate(run: Path, checkpoint: str, overrides: Sequence[str], task_folder: Path | None, limit: int | None) -> int:
    from cod_lightning.config.compose import changes_text
    from cod_lightning.config.saved import load

    tasks, overrides = taken("tasks", overrides)
    config = load(run, overrides)
    if tasks is not None:
        if changes_text(overrides):
            raise UserError("tasks= brings its own text: leave out data=, or tasks=")
        return evaluate_tasks(config, run, checkpoint, tasks, task_folder, limit)
    if task_folder is not None or limit is not None:
        raise UserError("--task-folder and --limit are for tasks=")
    from cod_lightning.config.schema import COUNTS, TOKENIZER
    from cod_lightning.train.load import checkpoint_of
    from cod_lightning.train.run import evaluate as validate

    check_ranks(config.trainer)
    path = checkpoint_of(run, checkpoint)
    if changes_text(overrides):
        if config.task != "language":
            raise UserError(f"{run} is a run of task={config.task}: it reads images.folder=, not data=")
        # Other data has to be read with the tokens that the model knows.
        config.data.tokenizer = str(run / TOKENIZER)
    figures = validate(config, path)
    if is_first_rank():
        for name, value in figures.items():
            print(f"{name} {value:.0f}" if name in COUNTS else f"{name} {value:.6g}")
    return 0


def evaluate_tasks(
    config: Config, run: Path, checkpoint: str, tasks: str, task_folder: Path | None, limit: int | None
) -> int:
    from cod_lightning.evaluate.lm_eval import PAPER_TASKS, save_scores, score_tasks, task_manager

    at_least("limit", limit, 1)
    names = PAPER_TASKS if tasks == "paper" else tuple(filter(None, tasks.split(",")))
    manager = task_manager(names, task_folder)
    from cod_lightning.train.load import checkpoint_of, load_decoder
    from cod_lightning.train.strategy import accelerator

    decoder, tokenizer = load_decoder(config, run, checkpoint_of(run, checkpoint))
    scores = score_tasks(
        decoder,
        tokenizer,
        names,
        manager,
        max_length=config.data.seq_len,
        batch_size=config.data.micro_batch_size,
        device=accelerator(config.trainer),
        limit=limit,
    )
    for task, figures in scores.items():
        for name, value in figures.items():
            print(f"{task} {name} {value:.6g}")
    if limit is None:
        save_scores(run, scores)
    return 0


def export(run: Path, to: str, output: Path | None, checkpoint: str, dtype: str, max_length: int | None) -> int:
    from cod_lightning.config.saved import load

    config = load(run)
    at_least("max-length", max_length, 1)
    import torch

    from cod_lightning.files import check_new_folder
    from cod_lightning.nn.huggingface import export as write
    from cod_lightning.train.load import checkpoint_of, load_decoder

    folder = output or run / to
    check_new_folder(folder)
    decoder, tokenizer = load_decoder(config, run, checkpoint_of(run, checkpoint))
    write(decoder, folder, tokenizer, getattr(torch, dtype), max_length or config.data.seq_len)
    print(folder)
    return 0


def consolidate(run: Path, checkpoint: str, output: Path | None) -> int:
    from cod_lightning.train.checkpoint import AtomicCheckpointIO, read_checkpoint
    from cod_lightning.train.load import checkpoint_of

    path = checkpoint_of(run, checkpoint)
    content = read_checkpoint(path)
    target = output or path.with_name(f"whole-{content['global_step']:08d}.ckpt")
    if target.exists():
        raise UserError(f"{target} exists: name a new file with --output")
    io = AtomicCheckpointIO()
    io.save_checkpoint(content, target)
    if io.failure:
        raise UserError(io.failure)
    print(target)
    return 0


def import_model(model: str, output: Path) -> int:
    """Everything that is not the checkpoint's is a default; `evaluate` without data= takes `docs`, its rows packed."""
    from cod_lightning.config.saved import save
    from cod_lightning.config.schema import Config
    from cod_lightning.config.validate import problems
    from cod_lightning.data.config import DataConfig

    if not Path(model).is_dir():
        from cod_lightning.data.hub import require_cached_or_hub

        require_cached_or_hub(model, "Give a folder with config.json, weights and tokenizer.")
    from cod_lightning.config.schema import TOKENIZER
    from cod_lightning.data.tokenizers import load_tokenizer, with_pad_below
    from cod_lightning.files import check_new_folder, new_folder
    from cod_lightning.nn.huggingface import import_hf
    from cod_lightning.train.load import write_imported

    check_new_folder(output)
    decoder = import_hf(model)
    tokenizer = with_pad_below(load_tokenizer(model), decoder.lm_head.out_features)
    config = Config(
        experiment="import",
        description=f"Imported from {model}.",
        model=decoder.config,
        norm={"name": "pre_ln"},
        data=DataConfig(
            tokenizer=str(output.absolute() / TOKENIZER),
            # Of no effect, but a data= of evaluate's, checked before it gets this tokenizer, must not ask for more.
            vocab_size=decoder.lm_head.out_features,
            # Rows as long as pre-trained models are mostly compared at; for evaluate to change.
            seq_len=1024,
            micro_batch_size=1,
        ),
    )
    if found := problems(config):
        raise UserError("\n".join(found))
    with new_folder(output) as partial:
        save(config, partial)
        write_imported(decoder, tokenizer, partial)
    print(output)
    return 0


def at_least(option: str, value: int | None, bound: int) -> None:
    if value is not None and value < bound:
        raise UserError(f"--{option}={value} must be at least {bound}")


def generate(
    run: Path, prompt: str, checkpoint: str, max_tokens: int, temperature: float, top_k: int | None, seed: int
) -> int:
    from cod_lightning.config.saved import load

    config = load(run)
    for name, value, least, most in (
        ("max-tokens", max_tokens, 1, math.inf),
        ("temperature", temperature, 0, sys.float_info.max),
        ("top-k", top_k, 1, math.inf),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name}={value} must lie between {least} and {most}")
    from cod_lightning.evaluate.generate import generate as sample
    from cod_lightning.train.load import checkpoint_of, load_decoder

    decoder, tokenizer = load_decoder(config, run, checkpoint_of(run, checkpoint))
    ids = tokenizer.encode([prompt])[0][:-1]
    if not ids:
        raise UserError("prompt='' is empty: give at least one character to continue")
    ids += sample(
        decoder,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    print(tokenizer.backend.decode(ids))
    return 0


def measure(study: str, words: Sequence[str], checkpoint: str, rows: int, output: Path | None) -> int:
    models = [word for word in words if "=" not in word]
    options, overrides = measure_words([word for word in words if "=" in word], study)
    rows = options.pop("rows", rows)
    output = Path(options.pop("output")) if "output" in options else output
    at_least("rows", rows, 1)
    if study == "compare":
        return compare(models, options, overrides, checkpoint, rows, output)
    if len(models) != 1:
        raise UserError(f"measure {study} takes one model, {len(models)} are given; measure compare takes several")
    from cod_lightning.commands.measure_runner import run_prune, run_study
    from cod_lightning.files import check_new_folder
    from cod_lightning.measure.registry import measures_of

    if study == "prune":
        if output is None:
            raise UserError("measure prune writes a model: name its new folder, as in --output FOLDER")
        check_new_folder(output)
    elif "only" in options:
        measures_of(study, only=options["only"])  # what is unknown is refused before anything is loaded
    subject = open_subject(models[0], overrides, checkpoint, rows)
    model = Path(models[0])
    folder = output or (model / "measure" if is_run(models[0]) else Path("measure") / model.name)
    if study == "prune":
        run_prune(subject, options, folder)
    else:
        run_study(study, subject, options, folder)
    print(folder)
    return 0


def measure_words(words: Sequence[str], study: str) -> tuple[dict[str, Any], list[str]]:
    """The options among `key=value` words, and the rest: what a configuration could be asked for."""
    from cod_lightning.commands.measure_runner import study_options
    from cod_lightning.config.compose import fields_and_groups
    from cod_lightning.measure.options import parse_options

    known = {**study_options(study), "rows": int, "output": str}
    known |= {} if study in ("compare", "prune") else {"only": Sequence[str]}
    others = fields_and_groups() - known.keys()

    def is_option(word: str) -> bool:
        key = word.partition("=")[0]
        return key.isidentifier() and key not in others

    options = parse_options(filter(is_option, words), known, f"measure {study}")
    return options, [word for word in words if not is_option(word)]


def is_run(model: str) -> bool:
    from cod_lightning.config.saved import CONFIG

    return (Path(model) / CONFIG).is_file()


def open_subject(model: str, overrides: Sequence[str], checkpoint: str, rows: int) -> Any:
    """A run or a model of `transformers`, with held-out rows of the text that `overrides` ask for."""
    from cod_lightning.config.compose import changes_text, compose
    from cod_lightning.config.saved import load

    if is_run(model):
        run = Path(model)
        config = load(run, overrides)
        from cod_lightning.commands.measure_runner import open_run
        from cod_lightning.config.schema import TOKENIZER
        from cod_lightning.train.load import checkpoint_of

        if changes_text(overrides):
            if config.task != "language":
                raise UserError(f"{run} is a run of task={config.task}: it reads images.folder=, not data=")
            config.data.tokenizer = str(run / TOKENIZER)
        return open_run(config, run, checkpoint_of(run, checkpoint), rows)
    config = compose(overrides)
    if not Path(model).is_dir():
        from cod_lightning.data.hub import require_cached_or_hub

        require_cached_or_hub(model, "Give a run folder, or a folder with config.json, weights and tokenizer.")
    from cod_lightning.commands.measure_runner import open_model

    return open_model(model, config, rows)


def compare(
    models: Sequence[str],
    options: dict[str, Any],
    overrides: Sequence[str],
    checkpoint: str,
    rows: int,
    output: Path | None,
) -> int:
    if len(models) < 2:
        raise UserError(f"measure compare takes at least two models, {len(models)} given")
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"two models are called {max(names, key=names.count)}: rename a folder, to tell them apart")
    from functools import partial

    from cod_lightning.commands.measure_runner import run_comparison

    subjects = {
        name: partial(open_subject, model, overrides, checkpoint, rows)
        for name, model in zip(names, models, strict=True)
    }
    print(run_comparison(subjects, options, output or Path("measure") / "-".join(["compare", *names])))
    return 0


def estimate(overrides: Sequence[str], as_json: bool) -> int:
    import json

    from cod_lightning.config.compose import compose, sweep

    runs = list(sweep(overrides))
    settings = [estimate_settings(words) for words in runs]
    configs = [compose([word for word in words if word.partition("=")[0] not in ESTIMATE_SETTINGS]) for words in runs]
    from cod_lightning.commands.terminal import estimate_table, show
    from cod_lightning.train.estimate import estimate as needs

    found = [needs(config, **chosen) for config, chosen in zip(configs, settings, strict=True)]
    if as_json:
        entries = [{"overrides": words} | figures.plain() for words, figures in zip(runs, found, strict=True)]
        print(json.dumps(entries, indent=1))
    else:
        show(estimate_table(list(zip(varied(runs), found, strict=True))))
    return 0


def estimate_settings(words: Sequence[str]) -> dict[str, Any]:
    """The words of `estimate` that are no overrides, as arguments."""
    settings = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in ESTIMATE_SETTINGS:
            try:
                settings[name] = ESTIMATE_SETTINGS[name](value)
            except ValueError:
                kind = "whole number" if ESTIMATE_SETTINGS[name] is int else "number"
                raise UserError(f"{name}={value!r} must be a {kind}") from None
    return settings


def launch(
    scheduler: str, overrides: Sequence[str], grace: int, output: Path | None, submit: bool, **options: str | None
) -> int:
    from cod_lightning.commands.launch import slurm
    from cod_lightning.config.compose import compose

    at_least("grace", grace, 1)
    script = slurm(compose(overrides), overrides, grace=grace, **options)
    if output is not None:
        if output.exists():
            raise UserError(f"--output={output} exists: name a new file")
        output.write_text(script)
        print(output)
    if submit:
        try:
            return subprocess.run(["sbatch"], input=script, text=True).returncode
        except FileNotFoundError:
            raise UserError("--submit: there is no sbatch on this machine; print the script and submit it") from None
    if output is None:
        print(script, end="")
    return 0


def reproduce(words: Sequence[str], jobs: int, results: Path | None) -> int:
    from cod_lightning.paper.experiments import (
        Task,
        experiment_rows,
        find_experiments,
        load_experiments,
        remaining_tasks,
    )
    from cod_lightning.paper.results import MEASURES_FOLDER, RESULTS, save_result

    at_least("jobs", jobs, 1)
    own = {"scale": "paper", "seeds": "1", "row": ""}
    own |= dict(word.split("=", 1) for word in words if word.partition("=")[0] in own)
    overrides = [word for word in words if "=" in word and word.partition("=")[0] not in own]
    if not own["seeds"].isdecimal() or int(own["seeds"]) < 1:
        raise UserError(f"seeds={own['seeds']} must be a number of seeds, at least 1")
    names = find_experiments([word for word in words if "=" not in word])
    asked = list(experiment_rows(names, own["scale"], overrides))
    if own["row"]:
        known = dict.fromkeys(row.name for row in asked)
        wanted = own["row"].split(",")
        if wrong := next((name for name in wanted if name not in known), None):
            raise UserError(f"row={wrong!r} is not a row: {nearest(wrong, known)}")
        asked = [row for row in asked if row.name in wanted]
    seeds = range(1, int(own["seeds"]) + 1)
    target = results or RESULTS
    tasks = remaining_tasks(asked, seeds, target)

    def carry_out_one(task: Task) -> int:
        model, status = task.row.public_model or str(task.folder), 0
        if task.row.public_model is None:
            status = run_marked(["fit", *task.cli_args], task.label, jobs)
            if status == 0 and task.row.tasks is not None:
                status = run_marked(["evaluate", model, f"tasks={task.row.tasks}"], task.label, jobs)
            save_result(task.folder, target)
        if status == 0 and task.measures:
            command = ["measure", "all", model, f"only={','.join(sorted(task.measures))}", f"rows={MEASURED_ROWS}"]
            if task.row.public_model is not None:
                command += [*task.row.overrides, f"output={task.folder / MEASURES_FOLDER}"]  # the last one counts
            status = run_marked(command, task.label, jobs)
            if status == 0:
                save_result(task.folder, target, task.measures)
        return status

    print(f"{len(tasks)} to carry out, of {len(asked) * len(seeds)} asked for", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        # What a run starts from has to be there before it.
        waves = [[t for t in tasks if t.row.source is None], [t for t in tasks if t.row.source is not None]]
        statuses = [status for wave in waves for status in pool.map(carry_out_one, wave)]

    from cod_lightning.commands.terminal import reproduced, show

    show(reproduced(load_experiments(asked, target)))
    return max(statuses, key=abs, default=0)


def report(results: Path | None, output: Path) -> int:
    from cod_lightning.paper.claims import SCALES
    from cod_lightning.paper.experiments import experiment_rows, load_experiments, reproducible_experiments
    from cod_lightning.paper.report import CSV, FIGURES, HTML, MARKDOWN, build_report
    from cod_lightning.paper.results import RECORD, RESULTS

    if results is not None and not results.is_dir():
        raise UserError(f"--results={results} is not a folder")
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--output={output} cannot be written: {place} is a file, or nothing may be made in it")
    results = results or RESULTS
    run = [scale for scale in SCALES if scale == "paper" or any(results.glob(f"{scale}/*/{RECORD}"))]
    names = reproducible_experiments()
    rows = (row for scale in run for row in experiment_rows(names, scale))
    made = build_report(load_experiments(rows, results), ESTIMATED_FOR)
    files = {MARKDOWN: made.markdown.encode(), HTML: made.html.encode(), CSV: made.csv.encode()}
    files |= {f"{FIGURES}/{name}": image for name, image in made.figures.items()}
    for name, content in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(path)
    return 0


ESTIMATED_FOR = "one H100 at 40 % of its peak"
"""What `estimate` takes by default."""
MEASURED_ROWS = 64
"""Held-out rows that the measures of an experiment are taken on."""


def experiments() -> int:
    from cod_lightning.commands.terminal import experiments_table, show
    from cod_lightning.config.compose import choices, compose
    from cod_lightning.paper.experiments import format_tokens, num_parameters, training_tokens

    rows = []
    for name in choices("experiments"):
        config = compose([f"experiments={name}"])
        model = config.model
        claims = config.paper.get("rows", {})
        published = [f"{name} {figure}" for name, row in claims.items() for figure in figures_of(row.get("published"))]
        rows.append(
            {
                "experiment": name,
                "reproduces": config.description,
                "model": f"{model.num_hidden_layers} x {model.hidden_size}",
                "parameters": f"{num_parameters(config) / 1e6:,.1f}M",
                "token positions": "none, measured"
                if any("subject" in row for row in claims.values())
                else format_tokens(training_tokens(config)),
                "published": "\n".join(published) or "none",
            }
        )
    show(experiments_table(rows))
    return 0


def figures_of(published: float | dict[str, float] | None) -> list[str]:
    """Published figures of a row: one number, several by name, of which the average stands for all, or none."""
    if published is None:
        return []
    if not isinstance(published, dict):
        return [f"{published:.2f}"]
    return [
        f"{name} {value:.2f}" for name, value in published.items() if "average" not in published or name == "average"
    ]
