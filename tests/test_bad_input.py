"""Bad input gives one error that names the field or file, with status 2, no traceback and no written file."""

import gzip
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cod_lightning.cli import main
from cod_lightning.commands import experiments
from cod_lightning.commands.export import check_max_length
from cod_lightning.commands.fit import train_run
from cod_lightning.commands.measure import subject_opener
from cod_lightning.config.compose import compose
from cod_lightning.config.saved import load_config, save_config
from cod_lightning.data.prepare import prepared_folder
from cod_lightning.train.checkpoint import list_checkpoints
from command_words import last_of_each, run_command


class Malicious:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The folder of a finished run, and the folder of its prepared set."""
    config = compose([*toy, f"output={tmp_path_factory.mktemp('finished')}", "name=run"])
    return train_run(config)[1], prepared_folder(config.data)


# Functions that prepare the working folder of a case, given the folders of a finished run and of a prepared set.


def nothing(run, prepared):
    pass


def files(**contents):
    """Files by name, with `_` for each point in a name."""

    def prepare(run, prepared):
        for name, content in contents.items():
            path = Path(name.replace("_", "."))
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def with_run(change=lambda folder: None):
    """A changed copy of the finished run, in the folder `run`."""

    def prepare(run, prepared):
        shutil.copytree(run, "run")
        change(Path("run"))

    return prepare


def with_set(change=lambda folder: None):
    """A changed copy of the prepared set, in the folder `set`."""

    def prepare(run, prepared):
        shutil.copytree(prepared, "set")
        change(Path("set"))

    return prepare


def unfinished(change):
    """A copy of the run without its record, in the folder that `fit` would resume, with a changed last checkpoint."""

    def prepare(run, prepared):
        shutil.copytree(run, "out/run")
        Path("out/run/record.json").unlink()
        save_config(replace(load_config(run), output="out"), Path("out/run"))
        change(list_checkpoints(Path("out/run/checkpoints"))[-1])

    return prepare


def overwrite(path, content):
    """Overwrite a file of a folder with text, bytes, or a function of its bytes."""

    def change(folder):
        target = next(folder.glob(path))
        if callable(content):
            target.write_bytes(content(target.read_bytes()))
        else:
            target.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(path):
    return lambda folder: next(folder.glob(path)).unlink()


def edit(path, **changes):
    """Change values of a JSON file of a folder; `__` joins nested keys, None removes a key."""

    def change(folder):
        target = folder / path
        content = json.loads(target.read_text())
        for keys, value in changes.items():
            *parents, last = keys.split("__")
            parent = content
            for key in parents:
                parent = parent[int(key) if key.isdecimal() else key]
            if value is None:
                del parent[last]
            else:
                parent[last] = value
        target.write_text(json.dumps(content))

    return change


def resave(change):
    """Change the content of a checkpoint, or of the last one of a run folder."""

    def apply(path):
        path = list_checkpoints(path / "checkpoints")[-1] if path.is_dir() else path
        content = torch.load(path, weights_only=True)
        torch.save(change(content), path)

    return apply


def flip(content):
    """Flip one bit of the content: in a checkpoint, in the middle of its largest tensor and not in padding."""
    at = len(content) // 2
    if zipfile.is_zipfile(io.BytesIO(content)):
        largest = max(zipfile.ZipFile(io.BytesIO(content)).infolist(), key=lambda part: part.file_size)
        at = largest.header_offset + largest.compress_size // 2
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def half(content):
    return content[: len(content) // 2]


def to_folder(run):
    """Put a folder in the place of the last checkpoint."""
    (run / LAST).unlink()
    (run / LAST).mkdir()


def lone(run):
    """Truncate the last checkpoint, and remove the one before it."""
    overwrite(LAST, half)(run)
    (run / "checkpoints/step-00000004.ckpt").unlink()


def with_runs(run, prepared):
    """A copy of the finished run in a folder of runs."""
    shutil.copytree(run, "runs/a")


def with_norm(weight):
    """Replace one weight of a checkpoint."""
    return lambda content: content | {"state_dict": content["state_dict"] | {"decoder.model.norm.weight": weight}}


def with_moment(moment):
    """Replace the first of Adam's moments in a checkpoint, or with {} all of its state."""

    def change(content):
        (optimizer,) = content["optimizer_states"]
        state = {} if moment == {} else optimizer["state"] | {0: optimizer["state"][0] | {"exp_avg": moment}}
        return content | {"optimizer_states": [optimizer | {"state": state}]}

    return change


def reshape(content):
    state = content["state_dict"]
    return content | {"state_dict": {name: tensor[:1] if tensor.ndim else tensor for name, tensor in state.items()}}


def module(body):
    """A module `norms_under_test` with the function `f`."""
    return lambda run, prepared: Path("norms_under_test.py").write_text(body)


DATA = ["data=files", "data.vocab_size=300", "data.seq_len=32", "data.workers=1", "data.root=new"]
LONG = "word " * 400
MINE = "norm=norms_under_test:f"
LOADED = ("evaluate", "run")
RESUMED = ("toy", "name=run")
SET = ("toy", "data.files=null", "data.folder=set")
TEXT = ("prepare", *DATA)
RAW_TEXT = [word for word in TEXT if word != "data.vocab_size=300"]

# --- configurations -------------------------------------------------------------------------------------------------

CONFIGS = [
    (nothing, ["fit", "experiments=table1_350"], ["experiments='table1_350'", "did you mean 'table1_350m'"]),
    (nothing, ["fit", "norm=mixln", "optim.lrr=2"], ["did you mean 'mix_ln'", "did you mean 'lr'"]),
    (nothing, ["fit", "-m", "norm=lns,mixln"], ["norm='mixln' does not exist: did you mean 'mix_ln'"]),
    (nothing, ["fit", "-m", "trainer.log_every=1,2"], ["would be the same run"]),
    (nothing, ["fit", "-m", "norm=pre_ln,lns", "name=x"], ["name= gives several runs of the sweep one folder"]),
    (nothing, ["fit", "-m", "seed=interval(1,3)"], ["a sweep takes a,b,c"]),
    (nothing, ["fit", "-j", "2"], ["--jobs=2", "-m"]),
    (nothing, ["fit", "-m", "-j", "0", "seed=1,2"], ["--jobs=0 must be at least 1"]),
    (nothing, ["fit", "-j", "two"], ["argument -j/--jobs: invalid int value: 'two'"]),
    (nothing, ["fit", "--nonsense"], ["unrecognized arguments: --nonsense"]),
    (nothing, ["fit", "trainer.max_steps"], ["expected key=value"]),
    (nothing, ["fit", "seed=1e400", "optim.lr=nan"], ["seed=1e400", "Integer"]),
    (
        nothing,
        ["fit", "optim.betas=0.9", "optim.lr=null"],
        ["optim.betas: it needs a list, such as [0.9,0.95]", "optim.lr: it needs a value, not null"],
    ),
    (nothing, ["fit", "init_from="], ["init_from is empty: name a run folder or a .ckpt file"]),
    (nothing, ["fit", "optim.betas=[0.9,nan]"], ["optim.betas=[0.9, nan] must be a finite number"]),
    (nothing, ["fit", "seed=99999999999999999999"], ["seed=99999999999999999999 is too large", "64 bits"]),
    (nothing, ["fit", "seed=-1"], ["seed=-1 must be at least 0"]),
    (nothing, ["fit", "model.num_hidden_layers=1000000000"], ["model.num_hidden_layers=1000000000 must be at most"]),
    (nothing, ["fit", "optim.betas=[[1],2]"], ["optim.betas=[[1], 2.0] must be at least 0"]),
    (nothing, ["fit", "row=[lns]"], ["row=\"['lns']\" does not exist"]),
    (
        nothing,
        ["fit", "experiments=table1_350m", "row=lns,pre_ln"],
        ["row=lns,pre_ln: several values are a sweep, which needs fit -m"],
    ),
    (nothing, ["fit", "experiments=table1_350m", "row=lns", "norm=lns"], ["row= and norm= both choose"]),
    (nothing, ["fit", "paper.rows=3"], ["paper.rows=3 must hold a mapping for each row"]),
    (nothing, ["fit", "paper.rows={a: {set: 3}}"], ["paper.rows.a.set=3 must be a mapping of overrides"]),
    (nothing, ["fit", "scales={toy: 3}"], ["scales.toy=3 must be a mapping of overrides"]),
    (nothing, ["fit", "scales={tiny: {seed: 1}}"], ["scales.tiny is not a field: did you mean 'toy'?"]),
    *(
        (nothing, ["estimate", one, two], [f"{one} and {two} are both given: keep one"])
        for one, two in (
            ("strategy=fsdp", "trainer=ddp"),
            ("gpus=1,2", "trainer.devices=2"),
            ("gpus=2", "+trainer.num_nodes=2"),
            ("strategy=ddp", "trainer=fsdp"),
            ("strategy=ddp", "trainer.strategy=fsdp"),
            ("checkpointing=full", "trainer.checkpointing=none"),
        )
    ),
    (nothing, ["fit", "output=${oc.env:HOME}"], ["output=${oc.env:HOME}: interpolation (${...}) is not supported"]),
    (nothing, ["fit", "paper.x=[{a: '${oc.env:HOME}'}]"], ["interpolation (${...}) is not supported: write the value"]),
    (nothing, ["fit", "output=$\\{seed\\}"], ["interpolation (${...}) is not supported"]),
    (nothing, ["fit", "data@norm=docs"], ["data@norm=docs: package overrides (@) are not supported: use data="]),
    (nothing, ["fit", "+norm=lns"], ["+norm=lns: the group has a choice already: use norm= without +"]),
    (nothing, ["fit", "hydra.run.dir=x"], ["hydra is not a field"]),
    (nothing, ["fit", "name='a\0b'"], ["name='a\\x00b' must be valid UTF-8 without NUL"]),
    (nothing, ["fit", "name=" + "a" * 300], ["a" * 300, "File name too long"]),
    (nothing, ["fit", "data.folder=''"], ["data.folder is empty"]),
    (nothing, ["fit", "data.root=''"], ["data.root is empty: name the folder of the prepared sets"]),
    (
        nothing,
        ["fit", "model.num_hidden_layers=2", "trainer.measures.theory=1"],
        ["trainer.measures.theory=1 does not apply to the model: it needs at least 3 blocks, but the model has 2"],
    ),
    (nothing, ["fit", "data=files", "data.files={a: b}"], ["data.files={'a': 'b'} must be a glob"]),
    (nothing, ["fit", "task=vision", "images.source=folder"], ["images.folder is empty"]),
    (
        nothing,
        ["fit", "images.size=16"],
        ["images.size=16 has no effect without task=vision: add it, or remove images.s"],
    ),
    (nothing, ["fit", "+images={size: 16}"], ["images.size=16 has no effect without task=vision"]),
    (with_run(), ["evaluate", "run", "images.folder=x"], ["images.folder=x has no effect without task=vision"]),
    (
        nothing,
        ["fit", "task=vision", "data.files=a.txt", "data.seq_len=64"],
        [
            "data.files=a.txt has no effect with task=vision, whose data is images.*: remove data.files",
            "data.seq_len=64 has no effect with task=vision",
        ],
    ),
    (nothing, ["fit", "experiments=table5_vit_s", "data=docs"], ["data=docs has no effect with task=vision"]),
    (
        nothing,
        ["fit", "task=vision", "images.folder=photos", "images.classes=9"],
        [
            "images.folder=photos has no effect with images.source=drawn: add images.source=folder, or remove",
            "images.classes=9 has no effect with images.source=drawn",
        ],
    ),
    (
        nothing,
        ["fit", "data.text_field=content", "data.encoding=latin-1"],
        ["data.text_field=content has no effect with data.source=docs: remove", "data.encoding=latin-1 has no effect"],
    ),
    (
        nothing,
        ["fit", "data.source=files", "data.files=a", "data.val_files=b", "data.val_every=9"],
        ["data.val_every=9 has no effect, because data.val_files or c4 have validation text of their own: remove"],
    ),
    (nothing, ["fit", "data=drawn_instructions", "data.layout=packed"], ["data.layout=packed has no effect with"]),
    (
        nothing,
        ["fit", "model.init=fan_in", "model.embedding_std=1", "model.init_std=1"],
        [
            "model.embedding_std=1 has no effect with model.init=fan_in: add model.init=normal, or remove",
            "model.init_std=1 has no effect with model.init=fan_in",
        ],
    ),
    (
        nothing,
        ["fit", "experiments=table3_olmo_1b", "optim.warmup_ratio=0.3"],
        ["optim.warmup_ratio=0.3 has no effect with optim.warmup_steps=2000: add optim.warmup_steps=null"],
    ),
    (nothing, ["fit", "optim.decay_embeddings=false"], ["optim.decay_embeddings=false has no effect without weight"]),
    *(
        (
            nothing,
            ["fit", "optim.warmup_start_ratio=0.1", word],
            ["optim.warmup_start_ratio=0.1 has no effect without warm"],
        )
        for word in ("optim.warmup_steps=0", "optim.warmup_ratio=0")
    ),
    *(
        (
            with_run(),
            ["toy", "init_from=run", word],
            [f"{word} has no effect with init_from=run, which gives all weights"],
        )
        for word in ("model.init_std=0.1", "model.embedding_std=1", "model.init=fan_in", "model.init_cutoff=2")
    ),
    (nothing, ["launch", "slurm", "--submit", "--output=job.sh"], ["--submit requires sbatch"]),
    (nothing, ["fit", "optim.lisa_interval=7"], ["optim.lisa_interval=7 has no effect without LISA"]),
    (
        nothing,
        ["fit", "trainer.precision=32-true", "trainer.auto_cuda=bf16-true"],
        ["trainer.auto_cuda=bf16-true has no effect with trainer.precision=32-true: add trainer.precision=auto"],
    ),
    (nothing, ["fit", "norm=pre_ln", "norm.name=lns"], ["norm= and norm.name= both choose the strategy: remove"]),
    (nothing, ["prepare", "data.vocab_size=1"], ["data.vocab_size=1 must be at least 258"]),
    (nothing, ["prepare", "shard=5/4"], ["shard=5/4: must be K/N"]),
    (nothing, ["prepare", "merge=0"], ["merge=0: must be the number"]),
    (nothing, ["prepare", "merge=100000000"], ["merge=100000000: must be the number of shards, at most 10,000"]),
    (nothing, ["prepare", "merge=" + 5000 * "9"], ["merge=9999", "(5006 characters): expected a whole number"]),
    (nothing, ["prepare", "shard=0/" + 5000 * "9"], ["shard=0/9999", "must be K/N"]),
    (nothing, ["prepare", "shard=0/4", "merge=4"], ["merge after all shards are finished"]),
    (nothing, ["prepare", "task=vision"], ["task=vision needs no preparation"]),
    (nothing, ["prepare", "data.folder=x"], ["data.folder='x' names a set that is already prepared"]),
]

# --- ranks and devices ----------------------------------------------------------------------------------------------

WORLDS = [
    (nothing, ["toy", "data.batch_size=9"], ["data.batch_size=9 is not divisible by data.micro_batch_size=8"]),
    (nothing, ["toy", "trainer=ddp", "trainer.devices=0"], ["trainer.devices=0 must be at least 1"]),
    (nothing, ["toy", "trainer.devices=2", "data.micro_batch_size=4"], ["trainer.strategy='auto' supports one rank"]),
    (nothing, ["toy", "trainer.strategy=fspd"], ["trainer.strategy='fspd'", "did you mean 'fsdp'"]),
    (nothing, ["toy", "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2", "data.micro_batch_size=4"],
     ["trainer.num_nodes=2, but no environment variable numbers this node", "MASTER_ADDR"]),
    (nothing, ["RANK=x", "toy"], ["RANK='x' in the environment is not an integer"]),
    (nothing, ["RANK=", "toy"], ["RANK='' in the environment is not an integer"]),
    (nothing, ["RANK=5", "toy"], ["RANK=5 in the environment is out of range"]),
    (nothing, ["WORLD_SIZE=4", "toy"], ["WORLD_SIZE=4 in the environment, but trainer.devices=1 x"]),
    (nothing, ["WORLD_SIZE=-1", "toy"], ["WORLD_SIZE='-1' in the environment is not an integer"]),
    (nothing, ["LOCAL_RANK=first", "toy"], ["LOCAL_RANK='first' in the environment is not an integer"]),
    (with_run(), ["SLURM_PROCID=x", *LOADED], ["SLURM_PROCID='x' in the environment is not an integer"]),
]  # fmt: skip
if not torch.cuda.is_available():
    WORLDS += [
        (nothing, ["toy", "trainer.accelerator=gpu"], ["trainer.accelerator='gpu'", "trainer.accelerator=cpu"]),
        (
            nothing,
            ["toy", "trainer=fsdp", "trainer.offload=true", "data.micro_batch_size=4"],
            ["trainer.offload=true requires a GPU: pass trainer.offload=false"],
        ),
    ]

# --- strategies -----------------------------------------------------------------------------------------------------

RETURNS = "from cod_lightning.nn.strategies import BlockSpec, block\ndef f(layer, depth):\n    return "
SCHEDULED = (
    "from cod_lightning.nn.strategies import Schedule, block\ndef f(layer, depth):\n"
    "    return block(branch_schedule=Schedule(lambda step: "
)
STRATEGIES = [
    (nothing, ["fit", "norm=nowhere.norms:f"], ["No module named 'nowhere'", "package.module:function"]),
    (nothing, ["fit", "norm=.norms:f"], ["norm='.norms:f'", "expected an importable package.module:function"]),
    (nothing, ["fit", "norm=builtins:min"], ["expected a function (layer, depth, **options) -> BlockSpec"]),
    (nothing, ["fit", "norm.name=null"], ["norm=None is not the name of a strategy"]),
    (nothing, ["fit", "norm=mix_ln", "norm.fraction=true"], ["norm.fraction=True has the wrong type"]),
    (nothing, ["fit", "norm.foo=1"], ["norm.foo is not an option of 'lns'", "position"]),
    (module("def f(:"), ["fit", MINE], ["SyntaxError", "package.module:function"]),
    (module("import sys\nsys.exit(0)"), ["fit", MINE], ["SystemExit", "package.module:function"]),
    (
        module("def f(layer, depth):\n    return 1 / 0"),
        ["fit", MINE],
        ["raised ZeroDivisionError for layer=1, depth"],
    ),
    (module("def f(layer, depth):\n    return 3"), ["fit", MINE], ["returned int, expected a BlockSpec"]),
    (module("def f():\n    return 3"), ["fit", MINE], ["cannot be called as (layer, depth, **options)"]),
    (module(f"{RETURNS}block()"), ["fit", MINE, "norm.power=2"], ["norm.power is not an option", "it has none"]),
    (module(f"{RETURNS}BlockSpec(1, 2)"), ["fit", MINE], ["attention=1, expected a SublayerSpec", "ffn=2"]),
    (module(f"{RETURNS}block(gain='x')"), ["fit", MINE], ["attention.gain='x', expected a finite number"]),
    (module(f"{RETURNS}block(skip=float('nan'))"), ["fit", MINE], ["attention.skip=nan, expected a finite number"]),
    (module(f"{RETURNS}block(groups=0)"), ["fit", MINE], ["attention.groups=0, expected a whole number from 1"]),
    (module(f"{RETURNS}block(gate='in')"), ["fit", MINE], ["gate='in', expected one of no, output, input"]),
    (module(f"{RETURNS}block(pre_norm=1)"), ["fit", MINE], ["pre_norm=1, expected true or false"]),
    (
        module(f"{SCHEDULED}1.0 if layer + step < 9 else float('nan'), end=50))"),
        ["toy", MINE],
        ["branch_schedule of layer 3 at step 6 is nan, expected a finite number"],
    ),
    (
        module(f"{SCHEDULED}1 / step, end=50))"),
        ["toy", MINE],
        ["branch_schedule of layer 1 at step 0: ZeroDivisionError: division by zero"],
    ),
    *((module(body), ["toy", MINE], [message]) for body, message in (
        (f"{SCHEDULED}10**400, end=50))", f"at step 0 is 1{'0' * 39}... (401 characters), expected a finite number"),
        (f"{SCHEDULED}-(10**5000), end=50))", "at step 0 is <int>, expected a finite number"),
        (f"{RETURNS}block(gain=10**400)", f"attention.gain=1{'0' * 39}... (401 characters), expected a finite"),
        (f"{RETURNS}block(gain='x' * 999)", f"attention.gain='{'x' * 39}... (1001 characters), expected a finite"),
        (f"import torch\n{RETURNS}block(gain=torch.ones(3))", "attention.gain=tensor([1., 1., 1.]), expected a finite"),
        (f"import numpy\n{RETURNS}block(gate=numpy.ones(3))", "attention.gate=array([1., 1., 1.]), expected one of no"),
        ("def f(layer, depth):\n    raise ValueError('a\\nb')", "raised ValueError for layer=1, depth=3: a b"),
        (f"{RETURNS}block(groups=-(10**400))", f"attention.groups=-1{'0' * 38}... (402 characters), expected a whole"),
    )),
    (nothing, ["fit", f"seed={'9' * 400}"], [f"seed={'9' * 40}... (400 characters) is too large"]),
]  # fmt: skip

# --- text and prepared sets -----------------------------------------------------------------------------------------

SETS = [
    (nothing, ["fit", "data=c4"], ["c4", "data=files"]),
    (nothing, [*TEXT, "data.files=nothing/*.jsonl"], ["data.files: no file matches 'nothing/*.jsonl'"]),
    (files(a_tsv="a"), [*TEXT, "data.files=a.tsv"], ["data.files: a.tsv is not one of .txt"]),
    (files(a_jsonl="[" * 100000), [*TEXT, "data.files=a.jsonl"], ["a.jsonl, line 1: a list"]),
    (files(a_jsonl='{"text": 3}'), [*TEXT, "data.files=a.jsonl"], ['a.jsonl, line 1: no string in the field "text"']),
    (files(a_csv="text\nhello, world\n"), [*TEXT, "data.files=a.csv"],
     ["a.csv, line 2: 2 values for 1 column", "quote values that hold a comma"]),
    (files(a_csv="text,text\na,b\n"), [*TEXT, "data.files=a.csv"], ['a.csv: two columns "text": rename one']),
    (files(a_jsonl="\0" * 8 + "\n"), [*TEXT, "data.files=a.jsonl"], ["a.jsonl, line 1: not JSON"]),
    (files(a_txt=LONG), [*RAW_TEXT, "data.files=a.txt", "data.tokenizer=a.txt"], ["data.tokenizer='a.txt' is a file"]),
    (files(a_txt=""), [*TEXT, "data.files=a.txt"], ["the corpus has no training documents"]),
    (files(a_txt=bytes(range(256)) * 9), [*TEXT, "data.files=a.txt"], ["a.txt is not UTF-8"]),
    (files(a_txt=LONG.encode("utf-16")), [*TEXT, "data.files=a.txt"], ["a.txt is not UTF-8"]),
    (files(a_txt_gz=gzip.compress(LONG.encode())[:-9]), [*TEXT, "data.files=a.txt.gz"], ["a.txt.gz cannot be read"]),
    (files(a_txt=LONG), [*TEXT[:-1], "data.files=a.txt", "data.root=a.txt/x"], ["data.root=a.txt/x cannot be written"]),
    (
        nothing,
        ["toy", "data.files=null", "data.folder=nowhere"],
        ["nowhere is not a prepared set", "name the folder that prepare printed"],
    ),
    (with_set(remove("manifest.json")), SET, ["set is not a prepared set (manifest.json cannot be read"]),
    (with_set(overwrite("manifest.json", "")), SET, ["manifest.json is damaged", "prepare it again"]),
    (with_set(overwrite("manifest.json", b"\xff\xfe")), SET, ["manifest.json cannot be read"]),
    (with_set(overwrite("manifest.json", "[" * 100000)), SET, ["manifest.json is damaged", "prepare it again"]),
    (with_set(edit("manifest.json", train__rows=7)), SET, ["manifest.json is damaged", "prepare it again"]),
    *((with_set(edit("manifest.json", **change)), SET, ["its fingerprint does not match its content"])
      for change in ({"val__max_id": 9}, {"sha256": None})),
    (with_set(edit("manifest.json", source__name=3)), SET, ["source.name: expected a string, got 3"]),
    (with_set(edit("manifest.json", sha256=None, train__chunks__0__name="../val/x.bin")), SET, ["cannot hold"]),
    (with_set(edit("manifest.json", sha256=None, dtype="float16")), SET, ["'float16'"]),
    (with_set(remove("train/*.bin")), SET, ["is incomplete", ".bin: missing"]),
    (with_set(overwrite("train/*.bin", half)), SET, [".bin: ", "bytes instead of"]),
    (with_set(overwrite("val/*.bin", flip)), SET, [".bin is damaged: its SHA-256"]),
    (with_set(remove("train/index.json")), SET, ["index.json: missing"]),
    (with_set(overwrite("tokenizer.json", half)), SET, ["tokenizer.json is damaged: its SHA-256"]),
    (with_set(), [*SET, "data.seq_len=64", "data.vocab_size=400"], ["data.seq_len=64, but the set has 32", "400"]),
    (with_set(), [*SET, "data=docs"], ["data.source='docs', but the set has 'files'"]),
    *((with_set(), [*SET, word], [f"{word} does not change data.folder=set, a prepared set"])
      for word in ("data.files=x", "data.val_files=x", "data.text_field=x", "data.val_every=7")),
    (with_set(), [*SET, "model.vocab_size=299", "data.vocab_size=300"], ["model.vocab_size=299 is smaller"]),
]  # fmt: skip

# --- checkpoints, and the rest of a run folder ----------------------------------------------------------------------

DAMAGED = ["damaged, not a readable checkpoint", "; remove it to use step-00000004.ckpt, or copy it again, or pass res"]
LAST = "checkpoints/step-00000006.ckpt"
STEPS = ("checkpoints/step-00000004.ckpt", LAST)
RUNS = [
    *((nothing, [*words], ["nowhere: not a run folder", "config.yaml"]) for words in (
        ["evaluate", "nowhere"], ["generate", "nowhere", "text"], ["export", "nowhere"],
        ["evaluate", "nowhere", "tasks=piqa,boolq"],
    )),
    *((files(config_json="{}"), words, [f"{words[-1]}: a pretrained model", "import . --output RUN"]) for words in (
        ["evaluate", "."], ["export", "."], ["toy", "init_from=."],
    )),
    (files(m_gguf="GGUF"), ["toy", "init_from=m.gguf"], ["init_from=m.gguf: a pretrained", "import m.gguf --output"]),
    *((with_run(overwrite(LAST, content)), words, [f"run/{LAST}", *DAMAGED]) for content, words in (
        ("", LOADED),
        ("text", ["generate", "run", "the norm"]),
        (half, ["export", "run", "--output", "x"]),
        (flip, LOADED),
        (pickle.dumps(Malicious()), LOADED),
        (b"\x00" * 5000, ["measure", "variance", "run"]),
    )),
    (with_run(to_folder), LOADED, [f"run/{LAST}", "a folder without rest.pt", *DAMAGED]),
    (with_run(lone), LOADED, [f"run/{LAST}: damaged", "); copy it again, or pass resume=false"]),
    (with_run(overwrite("checkpoints/best.ckpt", half)), [*LOADED, "--checkpoint", "best"],
     ["best.ckpt: damaged", "; use step-00000006.ckpt, or copy it"]),
    (with_run(lambda folder: shutil.rmtree(folder / "tokenizer")), ["generate", "run", "x"],
     ["run: no folder tokenizer/"]),
    (with_run(resave(lambda content: [])), LOADED, [*DAMAGED, "it holds no decoder"]),
    (with_run(resave(lambda content: {"state_dict": {"a": 1}, "tokens": 0})), LOADED, ["it holds no decoder"]),
    (with_run(resave(lambda content: {"state_dict": {"a": Malicious()}, "tokens": 0})), LOADED, DAMAGED),
    (with_run(resave(lambda content: {"state_dict": {}, "tokens": 0})), ["generate", "run", "the norm"],
     ["not a checkpoint of a decoder: lm_head.weight is missing"]),
    *((with_run(resave(with_norm(value))), ["generate", "run", "x"],
       [f"run/{LAST}", f"decoder.model.norm.weight is {kind}"])
      for value, kind in (
        (torch.ones(32).to_sparse(), "torch.sparse_coo"), (torch.ones(32, device="meta"), "without values"),
        (torch.ones(32).int(), "torch.int32"), (torch.ones(32) * 1j, "torch.complex64"),
      )),
    (with_run(resave(reshape)), LOADED, [LAST, "parameters have another shape", "in the checkpoint", "in this run"]),
    (with_run(lambda folder: shutil.rmtree(folder / "checkpoints")), LOADED, ["no last checkpoint", "fit"]),
    (with_run(remove("checkpoints/best.ckpt")), [*LOADED, "--checkpoint", "best"], ["run: no best checkpoint"]),
    (with_run(), ["evaluate", "run", "norm.position=before_ln"],
     ["cannot change norm of the trained run run", "before_ln"]),
    (unfinished(lambda path: path.write_bytes(b"")), RESUMED, DAMAGED),
    (unfinished(lambda path: path.rename(path.with_name("step-00000009.ckpt"))), RESUMED,
     ["step-00000009.ckpt: holds step 6, not that of its name: rename it to step-00000006.ckpt"]),
    (unfinished(lambda path: path.write_bytes(flip(path.read_bytes()))), RESUMED, ["the checksum of", *DAMAGED]),
    (unfinished(resave(reshape)), RESUMED, ["of another shape than this run's", "resume=false"]),
    *((unfinished(resave(with_moment(moment))), RESUMED, ["no state of this run's optimizer", problem, "resume=false"])
      for moment, problem in (
        (torch.zeros(3), "exp_avg of parameter 0 is missing or has another shape"), (None, "exp_avg of parameter 0"),
        ("x", "exp_avg of parameter 0"), ({}, "it is empty"),
      )),
    (unfinished(resave(lambda content: {name: content[name] for name in ("state_dict", "tokens")})), RESUMED,
     ["holds weights, but not pytorch-lightning_version", "init_from="]),
    *((unfinished(resave(lambda content, name=name, value=value: content | {name: value})), RESUMED,
       [LAST, "damaged", name, kind])
      for name, value, kind in (
        ("optimizer_states", 3, "0.state: expected dict"), ("optimizer_states", [], "0.state: expected dict"),
        ("optimizer_states", [{}], "0.state: expected dict"), ("lr_schedulers", None, "0.last_epoch: expected int"),
        ("lr_schedulers", ["x"], "0.last_epoch: expected int"), ("global_step", "3", "int, got '3'"),
        ("loops", {}, "fit_loop.epoch_progress.total.ready: expected int"),
        ("loops", {"fit_loop": {}}, "fit_loop.epoch_progress.total.ready: expected int, got nothing"),
        ("callbacks", [], "Recorder.history: expected dict"), ("pytorch-lightning_version", 3, "str, got 3"),
        ("TokenDataModule", 3, "fingerprint: expected str"), ("TokenDataModule", {"fingerprint": 3}, "str, got 3"),
        ("ImageDataModule", [5], "fingerprint: expected str"), ("settings", [5], "dict, got [5]"),
      )),
    (unfinished(resave(lambda content: content | {"TokenDataModule": {"fingerprint": "0" * 64}})), RESUMED,
     ["trained on a set with fingerprint 0000000000000000...", "resume with the same data"]),
    *((unfinished(lambda path: (path.parents[1] / "config.yaml").unlink()), [*RESUMED, word],
       [f"{LAST} is of a run with other settings ({fields}): choose another name=, or pass resume=false to retrain"])
      for word, fields in (
        ("seed=2", "seed=1 there, 2 here"), ("trainer.max_steps=3", "trainer.max_steps=6 there, 3 here"),
        ("norm.position=before_ln", "norm.position='after_ln' there, 'before_ln' here"),
      )),
    (unfinished(lambda path: None), [*RESUMED, "seed=2"], ["out/run holds a run of another configuration (seed=1"]),
    (with_run(overwrite("record.json", "[]")), ["toy", "output=.", "name=run"], ["run/record.json: expected an"]),
    (with_run(edit("record.json", config__optim__lr=0.5)), ["toy", "output=.", "name=run"],
     ["run/record.json is of a run with other settings: remove it, or choose another name="]),
    *((with_run(overwrite("config.yaml", lambda content: content.replace(b"rope_theta: 10000.0", b"rope_theta: 1.0"))),
       words, [f"{LAST} was trained with another model than config.yaml of its run names (model.rope_theta=10000.0"])
      for words in (
        LOADED, ["generate", "run", "x"], ["export", "run", "--output", "x"], ["measure", "variance", "run"],
        ["toy", "init_from=run", "model.rope_theta=1"],
      )),
    *((with_run(lambda folder, names=names: [remove(name)(folder) for name in ("config.yaml", "record.json", *names)]),
       ["toy", "output=.", "name=run"], [f"run has {kept}/, but it is no run: choose another name="])
      for names, kept in ((STEPS, "checkpoints"), ((*STEPS, "checkpoints/best.ckpt"), "tokenizer"))),
    (with_run(edit("record.json", history__val__step=[])), ["toy", "output=.", "name=run"], ["step is missing"]),
    *((with_run(overwrite("config.yaml", content)), LOADED, [f"run/config.yaml: {problem}", "; restore it from a copy"])
      for content, problem in (
        ("", "not a saved configuration: it is empty"),
        ("\n", "not a saved configuration: it is empty"),
        ("a: [b", "not a saved configuration: while parsing a flow sequence"),
        ("- a", "not a saved configuration: not a mapping of sections"),
        ("5", "not a saved configuration: not a mapping of sections"),
        ("text", "not a saved configuration: "),
        (half, "not a saved configuration: "),
    )),
    *((with_run(overwrite("config.yaml", lambda text, end=end: text[: text.index(end)])), LOADED,
       [f"run/config.yaml: not a saved configuration: truncated, it lacks {section}", "; restore it from a copy"])
      for end, section in ((b"data:", "data, eval, optim, paper, scales, trainer"), (b"paper:", "paper, scales"))),
    *((with_run(overwrite("config.yaml", lambda text, old=old, new=new: text.replace(old, new))), LOADED,
       [f"run/config.yaml: not a saved configuration: {field}: ", "; restore it from a copy"])
      for field, old, new in (
        ("seed", b"seed: 1", b"seed: x"), ("model.hidden_size", b"hidden_size: 32", b"hidden_size: x"),
        ("data.seq_len", b"seq_len: 32", b"seq_len: null"),
      )),
    (with_run(overwrite("config.yaml", b"\xff\x00")), LOADED, ["run/config.yaml: not a saved configuration"]),
    (with_run(overwrite("config.yaml", "output: ${oc.env:HOME}")), LOADED, ["config.yaml", "interpolation"]),
    (with_run(overwrite("config.yaml", "name: !!python/object/apply:os.mkdir [executed]")), LOADED,
     ["run/config.yaml: not a saved configuration: could not determine a constructor for the tag"]),
    (with_run(overwrite("config.yaml", lambda text: text.replace(b"seed: 1", b"seed: -1"))), LOADED,
     ["run/config.yaml: seed=-1 must"]),
    (with_run(overwrite("config.yaml", "a: " + "[" * 50000)), LOADED, ["run/config.yaml: not a saved configuration"]),
    (with_run(overwrite("tokenizer/tokenizer.json", "{}")), ["generate", "run", "x"],
     ["tokenizer.json cannot be read"]),
    (with_run(overwrite("tokenizer/tokenizer.json", half)), ["generate", "run", "x"],
     ["tokenizer.json cannot be read"]),
    (with_run(overwrite("tokenizer/special_tokens_map.json", "[]")), ["generate", "run", "x"],
     ["special_tokens_map.json: expected an object", "must hold a JSON object"]),
    (with_run(overwrite("tokenizer/special_tokens_map.json", '{"eos_token": 5}')), ["generate", "run", "x"],
     ["eos_token=5 must be a token"]),
    (with_run(), ["toy", "norm=pro_res", "init_from=run"], ["init_from does not support norm=pro_res, whose branch_"]),
    (with_runs, ["toy", "init_from=runs"], ["init_from=runs: not a run folder", "name one, such as runs/a"]),
    *((nothing, ["toy", f"init_from={path}"], [f"init_from={path}: neither a run folder nor a .ckpt file"])
      for path in (".", "/dev/null")),
    (with_run(overwrite(LAST, half)), ["toy", "init_from=run"], DAMAGED),
    (with_run(), ["toy", "init_from=run", "norm=pre_ln"], ["decoder: add norm=lns norm.position=after_ln, or"]),
]  # fmt: skip

# --- commands -------------------------------------------------------------------------------------------------------

RECORDS = Path("results/toy/a")


def record(change):
    """A results folder with the record of the run, changed."""

    def prepare(run, prepared):
        RECORDS.mkdir(parents=True)
        shutil.copy(run / "record.json", RECORDS)
        change(RECORDS)

    return prepare


def more_tokens(run):
    """Add tokens to a run's tokenizer that its model does not embed."""
    path = run / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"extra{number}": len(vocabulary) + number for number in range(500)}
    path.write_text(json.dumps(content))


def no_results(run, prepared):
    Path("results").mkdir()


REPORT = ["report", "--results", "results", "--output", "new"]
COMMANDS = [
    (nothing, ["nonsense"], ["'nonsense' is not a command"]),
    (nothing, [], ["the following arguments are required: command"]),
    (with_run(), ["generate", "run", ""], ["prompt='' is empty"]),
    *((with_run(), ["generate", "run", prompt], [f"prompt is not UTF-8: {place}: convert it"]) for prompt, place in (
        ("caf\udce9", "byte 0xe9 in place 4"), ("\udcff\udcfe", "byte 0xff in place 1"),
    )),
    (with_run(), ["generate", "run", "x", "--temperature", "nan"], ["--temperature=nan must be at least 0"]),
    (with_run(), ["generate", "run", "x", "--max-tokens", "0"], ["--max-tokens=0 must be at least 1"]),
    (with_run(), ["generate", "run", "x", "--max-tokens", "9" * 20], ["must be at most 1000000"]),
    (with_run(more_tokens), ["export", "run", "--output", "x"], ["run/tokenizer has ", "and the model embeds"]),
    (with_run(more_tokens), ["generate", "run", "x"], ["run/tokenizer has ", "use the tokenizer that it was trained"]),
    (no_results, REPORT, ["results has no results: run reproduce, or name the folder by --results"]),
    (with_run(), ["generate", "run", "x", "--top-k", "-1"], ["--top-k=-1 must be at least 1"]),
    (with_run(), ["generate", "run", "x", "--seed", str(2**64)], ["--seed=18446744073709551616 must be at most"]),
    *((with_run(), ["generate", "run", "x", "--temperature", "0", word, "3"],
       [f"{word}=3 has no effect on greedy decoding, --temperature=0: remove it"]) for word in ("--top-k", "--seed")),
    (with_run(), ["generate", "run", "x", "--top-k", "9999"], ["top_k=9999 is more than the 300 tokens of the voca"]),
    (with_run(), ["evaluate", "run", "--limit", "3"], ["--task-folder and --limit require tasks="]),
    (with_run(), ["evaluate", "run", "tasks=piqa", "data.files=x"], ["data.files=x has no effect"]),
    (with_run(), ["evaluate", "run", "tasks=piqa", "protocol=paper"], ["protocol= has no effect with tasks="]),
    (with_run(), ["evaluate", "run", "tasks=piqa", "--limit", "0"], ["--limit=0 must be at least 1"]),
    (with_run(), ["evaluate", "run", "optim=adamw"], ["optim=adamw: a trained run accepts data=, trainer="]),
    (with_run(), ["evaluate", "run", "protocol=papre"], ["protocol='papre'", "did you mean 'paper'"]),
    (with_run(), ["evaluate", "run", "data.folder=nowhere"], ["nowhere is not a prepared set"]),
    (with_run(), ["export", "run", "--max-length", "0"], ["--max-length=0 must be at least 1"]),
    (with_run(), ["export", "run", "--max-length", "16777217"], ["--max-length=16777217 must be at most 16777216"]),
    (with_run(overwrite("config.yaml", lambda text: text.replace(b"embeddings: null", b"embeddings: 64"))),
     ["export", "run", "--max-length", "65"], ["--max-length=65 is longer than the context of the imported model"]),
    (with_run(), ["export", "run", "--output", "caf\udce9"], ["not UTF-8: choose another output"]),
    (lambda run, prepared: shutil.copytree(run, "caf\udce9"), ["generate", "caf\udce9", "x"],
     ["step-00000006.ckpt: the name is not UTF-8: rename the file or its folder"]),
    (with_run(), ["export", "run/config.yaml"], ["run/config.yaml: not a run folder"]),
    (with_run(), ["export", "run", "--output", "run"], ["run exists and is not an empty folder"]),
    (with_run(), ["export", "run", "--dtype", "int8"], ["argument --dtype: invalid choice: 'int8'"]),
    (nothing, ["import", "nowhere", "--output", "x"], ["nowhere is not a folder here", "Give a folder"]),
    (nothing, ["import", "../nowhere", "--output", "x"], ["../nowhere does not exist: name the folder"]),
    (with_run(), ["import", "run", "--output", "x"], ["run: a run folder, not a pretrained model", "evaluate run`"]),
    *((with_runs, words, ["runs: neither a run nor a model", "it holds runs: name one, such as runs/a"])
      for words in (["import", "runs", "--output", "x"], ["convert", "runs", "norm=lns", "--output", "x"],
                    ["measure", "variance", "runs"], ["measure", "report", "runs"], ["verify", "runs"])),
    *((with_runs, words, ["runs: not a run folder: it has no config.yaml", "name one, such as runs/a"])
      for words in (["evaluate", "runs"], ["generate", "runs", "x"], ["export", "runs"])),
    *((nothing, words, ["'' names no model: name the folder"])
      for words in (["import", "", "--output", "x"], ["convert", "", "norm=lns", "--output", "x"],
                    ["grow", "", "blocks=3", "--output", "x"], ["measure", "variance", ""], ["verify", ""])),
    *((nothing, words, ["argument run: '' is empty: name a path"])
      for words in (["evaluate", ""], ["generate", "", "x"], ["export", ""], ["consolidate", ""])),
    (files(x="file"), ["import", ".", "--output", "x"], ["x exists and is not an empty folder"]),
    (nothing, ["measure", "varianc", "nowhere"], ["'varianc' is not a study: did you mean 'variance'?"]),
    (nothing, ["measure", "variance", "nowhere"], ["nowhere is not a folder here", "Give a run folder"]),
    (nothing, ["measure", "variance", "one", "two"], ["measure variance takes one model, not 2"]),
    (nothing, ["measure", "compare", "one"], ["at least two models, not 1"]),
    (nothing, ["measure", "compare", "a/one", "b/one"], ["two models have the name one"]),
    (nothing, ["measure", "report", "a/one", "b/one"], ["two models have the name one"]),
    *((with_run(lambda run: shutil.copytree(run, "b", ignore=shutil.ignore_patterns("checkpoints"))),
       ["measure", study, "run", "b"], ["b: no last checkpoint"]) for study in ("report", "compare")),
    (with_run(lambda run: (Path("b").mkdir(), Path("b/config.json").write_text("{}"))),
     ["measure", "report", "run", "b"], ["b: the model has no tokenizer"]),
    (nothing, ["measure", "variance", "nowhere", "--rows", "0"], ["--rows=0 must be at least 1"]),
    (nothing, ["measure", "variance", "nowhere", "rows=many"], ["rows=many: expected a whole number"]),
    (nothing, ["measure", "jacobian", "nowhere", "probs=32", "tokens=all"],
     ["probs is not an option of measure jacobian: did you mean 'probes'? known: iterations,", "tokens=all: expected"]),
    (nothing, ["measure", "angular", "nowhere", "token=lst"], ["token=lst: did you mean 'last'? known: all, last"]),
    (nothing, ["measure", "all", "nowhere", "tokens=4"], ["tokens is not an option of measure all", "threshold"]),
    (nothing, ["measure", "all", "nowhere", "only=angular", "probes=32", "permutations=5", "token=last"],
     ["probes is not an option of measure all only=angular: ", "known: normalise, only,", "permutations is not an"]),
    (nothing, ["measure", "removal", "nowhere", "sizes=[1,2]", "only=removal"],
     ["sizes is not an option of measure removal only=removal"]),
    (nothing, ["measure", "variance", "nowhere", "data.seqlen=3"], ["did you mean 'seq_len'"]),
    (nothing, ["measure", "prune", "nowhere", "layers=1"], ["name its new folder, as in --output FOLDER"]),
    (nothing, ["measure", "prune", "nowhere", "by=bi", "--output", "x"], ["by=bi: known: influence, removal, stream"]),
    (with_run(), ["measure", "jacobian", "run", "layers=99", "rows=2"], ["layers=[99]: expected 1 to 3"]),
    (with_run(), ["measure", "variance", "run", "only=", "rows=2"], ["only=''", "is not a measure of variance"]),
    (with_run(), ["measure", "prune", "run", "layers=99", "output=x", "rows=2"],
     ["layers=[99] do not exist: run has 1 to 3"]),
    (with_run(), ["measure", "prune", "run", "sparsity=2", "output=x", "rows=2"], ["sparsity=2.0 must be at most 1"]),
    *((nothing, ["measure", "prune", "nowhere", word, "--output", "x"], [f"{word}: expected a"]) for word in (
        "sparsity=nan", "blocks=two",
    )),
    (nothing, ["predict", "norm=mixln"], ["norm='mixln' does not exist: did you mean 'mix_ln'"]),
    *((nothing, ["predict", word], [f"{word} has no effect, remove it: predict reads only model, norm, seed"])
      for word in ("output=x", "optim.lr=1", "trainer.threads=1", "init_from=x",
                   "optim=lisa", "trainer=cpu")),
    (nothing, ["predict", "data.files=x"], ["data.files=x has no effect, remove it: predict reads only data.vocab"]),
    (nothing, ["predict", "experiments=table5_vit_s"], ["predict does not support task=vision"]),
    (nothing, ["predict", "model=tiny", "data.tokenizer=t5-base"],
     ["model.vocab_size is null, and the tokenizer data.tokenizer"]),
    (module("def f(layer, depth):\n    return 1 / (layer - 1)"), ["predict", MINE], ["raised ZeroDivisionError"]),
    (nothing, ["estimate", "hardware=abacus"], ["hardware='abacus'", "h100"]),
    *((nothing, ["estimate", f"{name}={value}", f"trainer.{name}={other}"],
       [f"{name}={value} and trainer.{name}={other} are both given: keep one"])
      for name, value, other in (("strategy", "ddp", "fsdp"), ("checkpointing", "full", "none"))),
    (nothing, ["estimate", "gpus=many"], ["gpus=many: expected a whole number"]),
    *((nothing, [*words, option, ""], [f"argument {option}: '' is empty: name a path"]) for words, option in (
        (["predict"], "--output"), (["report"], "--results"), (["export", "x"], "--output"),
        (["measure", "variance", "x"], "--output"), (["launch", "slurm"], "--output"),
    )),
    (nothing, ["measure", "variance", "x", "output="], ["output= is empty: name a path"]),
    (nothing, ["fit", "output="], ["output is empty: name a folder"]),
    (nothing, ["reproduce", "scale=toy"], ["no experiment is named: name one, such as table1"]),
    (nothing, ["reproduce", "table1", "row="], ["row='' does not exist: known: "]),
    (nothing, ["reproduce", "table99"], ["'table99' is not an experiment"]),
    (nothing, ["reproduce", "table1", "scale=huge"], ["scale='huge' does not exist", "mini, paper, small, toy"]),
    (nothing, ["reproduce", "table1", "seeds=none"], ["seeds=none: expected a whole number"]),
    (nothing, ["reproduce", "table1", "seeds=99999999999"], ["seeds=99999999999 must lie between 1 and 1,000"]),
    (nothing, ["reproduce", "table1_130m", "row=mixln"], ["row='mixln' does not exist: did you mean 'mix_ln'"]),
    (nothing, ["reproduce", "table1", "-j", "0"], ["--jobs=0 must be at least 1"]),
    (nothing, ["report", "--results", "nowhere"], ["--results=nowhere is not a folder"]),
    (record(overwrite("record.json", "")), REPORT, ["results/toy/a/record.json", "remove it"]),
    (record(overwrite("record.json", b"\xff")), REPORT, ["results/toy/a/record.json", "remove it"]),
    (record(overwrite("record.json", "[" * 100000)), REPORT, ["results/toy/a/record.json", "remove it"]),
    (record(edit("record.json", val_loss="low")), REPORT, ["record.json: not a run record (val_loss: expected"]),
    (record(edit("record.json", config__seed="x")), REPORT, ["record.json: not a saved configuration"]),
    (record(edit("record.json", config__output="${oc.env:HOME}")), REPORT, ["record.json", "interpolation"]),
]  # fmt: skip

# --- a key twice ----------------------------------------------------------------------------------------------------

REPEATED = [
    *((nothing, [*words, one, two], [f"{one.lstrip('+')} and {two.lstrip('+')} are both given: keep one"])
      for words, one, two in (
        (["fit"], "norm=lns", "norm=pre_ln"),
        (["fit"], "optim.lr=1", "optim.lr=1"),
        (["fit"], "+optim.lr=1", "optim.lr=2"),
        (["fit"], "logger=csv", "++logger=wandb"),
        (["fit", "-m"], "seed=1,2", "seed=3"),
        (["prepare"], "shard=0/2", "shard=1/2"),
        (["convert", "x", "--output", "new"], "norm=lns", "norm=pre_ln"),
        (["grow", "x", "--output", "new"], "blocks=8", "blocks=9"),
        (["estimate"], "gpus=1", "gpus=2"),
        (["evaluate", "x"], "tasks=a", "tasks=b"),
        (["predict"], "seed=1", "seed=2"),
        (["verify", "x"], "norm=lns", "norm=pre_ln"),
        (["launch", "slurm"], "seed=1", "seed=2"),
        (["reproduce", "table1"], "scale=toy", "scale=mini"),
        (["measure", "variance", "x"], "rows=1", "rows=2"),
        (["measure", "prune", "x"], "output=a", "output=b"),
    )),
    *((nothing, [*words, option, one, option, two], [f"{option}: {one} and {two} are both given: keep one"])
      for words, option, one, two in (
        (["generate", "x", "text"], "--seed", "1", "2"),
        (["export", "x"], "--dtype", "float32", "float16"),
        (["predict"], "--output", "a", "b"),
        (["launch", "slurm"], "--time", "1:00:00", "2:00:00"),
        (["measure", "variance", "x"], "--rows", "2", "2"),
    )),
    (nothing, ["fit", "-m", "-j", "1", "--jobs", "2"], ["-j/--jobs: 1 and 2 are both given"]),
    (nothing, ["measure", "variance", "x", "--rows", "2", "rows=2"], ["--rows=2 and rows=2 are both given"]),
    (nothing, ["measure", "prune", "x", "output=a", "--output", "b"], ["--output=b and output=a are both given"]),
]  # fmt: skip

# --- overrides without effect on a finished run ---------------------------------------------------------------------

HF = ("measure", "variance", "x")
UNREAD = [
    *((with_run(), [*command, word], [f"{word} has no effect, remove it: {reads}"]) for command, reads, words in (
        (LOADED, "evaluate reads only data, images, model, norm, eval, trainer",
         ["seed=3", "optim.lr=9", "name=x", "output=x", "init_from=x", "logger=csv", "task=vision", "paper.target=x",
          "nonsense=1"]),
        (LOADED, "evaluate reads only trainer.precision, trainer.auto_cuda, trainer.accelerator",
         ["trainer.max_steps=5", "+trainer.measures.gain=3", "trainer.checkpointing=full", "trainer.stats_every=1"]),
        (LOADED, "evaluate reads only eval.paper_batch, eval.paper_ranks", ["eval.every=3", "eval={every: 3}"]),
        (LOADED, "evaluate reads only data.source, data.files", ["data.batch_size=2", "data.repeat=false",
         "data.vocab_size=300"]),
        (LOADED, "evaluate reads only images.source", ["images.min_crop=0.5", "images={size: 8, min_crop: 0.5}"]),
        (LOADED, "evaluate reads data.max_documents only for a new text", ["data.max_documents=3"]),
        (LOADED, "evaluate reads eval.paper_batch only for protocol=paper", ["eval.paper_batch=3"]),
        (LOADED, "evaluate reads eval.paper_ranks only for protocol=paper", ["eval.paper_ranks=3"]),
        ((*LOADED, "tasks=piqa"), "evaluate tasks= reads only data.seq_len", ["data.val_every=3", "data.batch_size=2"]),
        ((*LOADED, "tasks=piqa"), "evaluate tasks= reads only trainer.accelerator", ["trainer=ddp"]),
        (("measure", "variance", "run"), "measure reads only data, images",
         ["seed=3", "optim.weight_decay=9", "eval.paper_batch=2", "name=x"]),
        (("measure", "variance", "run"), "measure reads only trainer.accelerator, trainer.threads",
         ["trainer.precision=bf16-true", "trainer=ddp", "trainer=fsdp", "trainer.devices=2"]),
        (("measure", "variance", "run"), "measure reads only data.source", ["data.loader_workers=1"]),
        (HF, "measure of a pretrained model reads only data, trainer",
         ["seed=3", "norm=lns", "model=tiny", "optim=adamw", "output.x=3", "row=lns", "paper.target=x",
          "protocol=paper"]),
        (HF, "measure of a pretrained model reads only trainer.accelerator", ["trainer.max_steps=3", "trainer=ddp"]),
        (HF, "measure of a pretrained model reads only data.source, data.files, data.val_files",
         ["data.folder=x", f"data.sha256={'0' * 64}", "data.layout=document", "data.tokenizer=gpt2", "data.root=x",
          "data.val_tokens=99999", "data.max_documents=2", "data.workers=2", "data.batch_size=2"]),
    ) for word in words),
    *((with_run(), [*LOADED, *words, word], [f"{word} has no effect", reason]) for words, word, reason in (
        (["trainer.precision=32-true"], "trainer.auto_cuda=bf16-true", "with trainer.precision=32-true"),
        (["data=docs"], "data.encoding=latin-1", "with data.source=docs"),
        (["data=docs"], "data.text_field=x", "with data.source=docs"),
        (["data=drawn_instructions"], "data.layout=packed", "with data.source=drawn_instructions"),
        (["data.val_files=x"], "data.val_every=3", ", because data.val_files or c4 have validation text"),
    )),
    (nothing, ["measure", "report", "x", "data=drawn_instructions", "data.folder=/nonexistent/set"],
     ["data.folder=/nonexistent/set has no effect, remove it: measure of a pretrained model reads only data.source"]),
    *((nothing, ["predict", "model.vocab_size=9999", word], [f"{word} has no effect, remove it: predict reads {field}"])
      for word, field in (("data.vocab_size=300", "data.vocab_size only for model.vocab_size=null"),
                          ("data.tokenizer=gpt2", "data.tokenizer only for"), ("data=c4", "data only for"))),
    (with_run(), [*LOADED, "seed=3", "name=x"], ["seed=3 has no effect", "name=x has no effect"]),
    (with_run(), ["export", "run", "seed=3"], ["unrecognized arguments: seed=3"]),
    (with_run(), ["generate", "run", "text", "seed=3"], ["unrecognized arguments: seed=3"]),
]  # fmt: skip

# --- values and destinations that are refused before anything is computed -------------------------------------------

EARLY = [
    (with_run(), ["measure", "removal", "run", "rows=2", "sizes=[0]"], ["sizes=[0]: expected 1 to 3"]),
    (with_run(), ["measure", "removal", "run", "rows=2", "sizes=[]"], ["sizes=[]: expected a whole number"]),
    (with_run(), ["measure", "report", "run", "rows=2", "longest=4"], ["longest=4: expected 1 to 3"]),
    (nothing, ["measure", "variance", "glassllm", "--checkpoint", "best"], ["--checkpoint and --trust-code apply to"]),
    (nothing, ["measure", "compare", "a/x", "b/y", "--trust-code"], ["--checkpoint and --trust-code apply to runs"]),
    *((nothing, [*words, "--checkpoint=best"], ["--checkpoint and --trust-code apply to runs"])
      for words in (["convert", "x", "norm=lns", "--output=o"], ["grow", "x", "blocks=9", "--output=o"],
                    ["verify", "x"])),
    (with_run(), ["grow", "run", "blocks=100000000", "how=interpolate", "--output", "x"], ["makes 4 to 10000"]),
    (nothing, ["grow", "x", f"blocks={'9' * 400}", "--output", "x"], ["... (407 characters): too large"]),
    (nothing, ["measure", "variance", "x", f"rows=-{'9' * 5000}"], ["(5006 characters): expected a whole number"]),
    (with_run(), ["grow", "run", "blocks=-1", "--output", "x"], ["blocks=-1: the model has 3 blocks"]),
    (nothing, ["predict", "model.intermediate_size=4000000", "model.num_hidden_layers=999"], ["model: out of memory"]),
    *((with_run(), [*words, f"{option}/proc/x"],
       [f"{name}/proc/x", "cannot be written: /proc is not a writable folder (No such file or directory)"])
      for words, option, name in (
        (["export", "run"], "--output=", "--output="),
        (["import", "x"], "--output=", "--output="),
        (["convert", "run", "norm=pre_ln"], "--output=", "--output="),
        (["grow", "run", "blocks=4"], "--output=", "--output="),
        (["predict"], "--output=", "--output="),
        (["launch", "slurm"], "--output=", "--output="),
        (["report"], "--output=", "--output="),
        (["reproduce", "table1", "scale=toy"], "--results=", "--results="),
        (["measure", "variance", "run"], "output=", "--output="),
        (["measure", "report", "run"], "--output=", "--output="),
        (["measure", "prune", "run", "layers=1"], "--output=", "--output="),
        (["toy", "name=run"], "output=", "the run folder "),
        (["prepare", "data=docs"], "data.root=", "data.root="),
    )),
    (with_run(), ["consolidate", "run", "--output", "whole"], ["--output=whole must end in .ckpt"]),
    (with_run(), ["export", "run", "--output", "run/config.yaml/x"], ["run/config.yaml is not a writable folder"]),
    (with_run(), ["measure", "variance", "run", "output=run/config.yaml"], ["run/config.yaml is not a writable"]),
    (with_run(), ["launch", "slurm", "--output=run"], ["--output=run exists: choose a new file"]),
]  # fmt: skip

# --- weights that are not finite ------------------------------------------------------------------------------------


def broken(value):
    """Put a value into one weight of the last checkpoint of a run."""

    def change(content):
        content["state_dict"]["decoder.model.layers.1.mlp.up_proj.weight"][3, 4] = value
        return content

    return with_run(resave(change))


FINITE = [
    *((broken(value), words, ["model.layers.1.mlp.up_proj.weight holds NaN or Inf (1 weights do): use another check"])
      for value, words in (
        (math.nan, ["export", "run", "--output", "x"]),
        (math.inf, ["measure", "prune", "run", "layers=1", "--output", "x"]),
        (-math.inf, ["convert", "run", "norm=pre_ln", "--output", "x"]),
        (math.nan, ["grow", "run", "blocks=4", "--output", "x"]),
        (math.nan, ["generate", "run", "the norm"]),
        (math.inf, ["evaluate", "run"]),
        (math.nan, ["toy", "init_from=run"]),
    )),
    (broken(1e5), ["export", "run", "--dtype", "float16", "--output", "x"],
     ["the float16 model to write: model.layers.1.mlp.up_proj.weight holds NaN or Inf"]),
]  # fmt: skip


def folder_content():
    """The bytes of every file below the current folder, except bytecode."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".pyc"}


def error_of(words, capsys, monkeypatch, toy):
    """The errors that a command prints; checks that it prints no warning or traceback and writes no file."""
    words = list(words)
    while words and words[0].partition("=")[0].isupper():
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[:1] == ["toy"]:
        words = last_of_each(["fit", *toy, "output=out", *words[1:]])
    before = folder_content()
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as stop:  # argparse's
        status = stop.code
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert status == 2, printed.err
    errors = [line for line in lines if line.startswith(("error: ", "cod_lightning")) and "error: " in line]
    assert errors, printed.err
    assert lines[-len(errors) :] == errors
    assert not [line for line in lines[: -len(errors)] if "rror" in line or "Traceback" in line or "arning" in line]
    assert "executed" not in os.listdir()
    assert folder_content() == before
    return "\n".join(errors)


ALL = [*CONFIGS, *WORLDS, *STRATEGIES, *SETS, *RUNS, *COMMANDS, *REPEATED, *UNREAD, *EARLY, *FINITE]
NAMES = [ascii(f"{number} {' '.join(words)[:60]}") for number, (_, words, _) in enumerate(ALL)]


@pytest.mark.parametrize(("prepare", "words", "expected"), ALL, ids=NAMES)
def test_bad_input_is_one_error_with_status_2_and_nothing_written(
    prepare, words, expected, finished, toy, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "norms_under_test", raising=False)
    prepare(*finished)
    error = error_of(words, capsys, monkeypatch, toy)
    assert all(part in error for part in expected), error


def test_more_rows_than_there_are_is_one_warning(finished, capsys):
    folder = str(finished[0])
    open_subject = subject_opener(folder, [], "last", 10**6)
    found = sum(map(len, open_subject().batches))
    open_subject()  # a report opens a model twice
    assert (
        capsys.readouterr().err == f"warning: rows=1000000, but {folder} has {found} held-out rows: all are measured\n"
    )
    subject_opener(folder, [], "last", None)()  # the default is a maximum
    subject_opener(folder, [], "last", found)()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "norm=mixln"], "error: norm='mixln' does not exist: did you mean 'mix_ln'?"),
        (["evaluate", "nowhere"], "error: nowhere: not a run folder"),
        (["report", "--results", "."], "error: --output=/dev/null/new cannot be written: /dev/null is not a w"),
    ],
)
def test_a_process_prints_only_errors_to_stderr(words, expected, tmp_path):
    words = [*words, "--output", "/dev/null/new"] if words[0] == "report" else words
    process = run_command(*words, cwd=tmp_path)
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith(expected)
    assert all(line.startswith("error: ") for line in process.stderr.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["import", "model", "--output", "x"], ["measure", "variance", "model"]])
@pytest.mark.parametrize("weights", ["pickle", "zip", "code"])
def test_code_in_a_model_folder_is_not_executed(command, weights, toy, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaConfig(vocab_size=300, **shape).save_pretrained("model")
    if weights == "pickle":
        Path("model/pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": Malicious()}))
    elif weights == "zip":
        torch.save({"model.embed_tokens.weight": Malicious()}, "model/pytorch_model.bin")
    else:
        Path("model/mine.py").write_text("import pathlib\npathlib.Path('executed').touch()\n")
        edit("config.json", model_type="mine", auto_map={"AutoConfig": "mine.C"})(Path("model"))
    Path("model/tokenizer.json").touch()
    errors = {
        "pickle": "pytorch_model.bin: damaged",
        "zip": "pytorch_model.bin: holds more than tensors",
        "code": "config.json: not a c",
    }
    assert f"model/{errors[weights]}" in error_of(command, capsys, monkeypatch, toy)


PRUNE = ["measure", "prune", "model", "layers=1", "--output", "x"]


@pytest.mark.parametrize("command", [["measure", "variance", "model"], PRUNE])
def test_commands_refuse_weights_of_another_name(command, toy, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **shape))
    model.config.save_pretrained("model")
    torch.save({f"_orig_mod.{name}": x for name, x in model.state_dict().items()}, "model/pytorch_model.bin")
    Path("model/tokenizer.json").touch()
    assert "model: the checkpoint lacks lm_head.weight and 20 other" in error_of(command, capsys, monkeypatch, toy)


@pytest.mark.parametrize("command", [["import", "model", "--output", "x"], ["measure", "variance", "model"], PRUNE])
def test_a_model_without_a_tokenizer_is_one_line_that_says_how_to_give_it(command, toy, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert error_of(command, capsys, monkeypatch, toy) == (
        "error: model: the model has no tokenizer: copy its tokenizer.json, or tokenizer.model, and "
        "tokenizer_config.json into the folder"
    )


@pytest.mark.parametrize("file", [LAST, "config.yaml", "tokenizer/tokenizer.json"])
def test_a_file_of_a_run_that_may_not_be_read_is_named(file, finished, forbid, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with_run()(*finished)
    forbid(Path("run") / file)
    assert main(["generate", "run", "x"]) == 2
    error = f"error: run/{file}: permission denied: change its permissions (chmod) or ask its owner\n"
    assert capsys.readouterr().err.endswith(error)


def test_a_longer_export_than_the_training_sequences_is_a_warning(capsys):
    config = compose(["data.seq_len=32"])
    check_max_length(32, config)
    assert not capsys.readouterr().err
    check_max_length(33, config)
    assert capsys.readouterr().err.startswith("warning: --max-length=33 is longer than data.seq_len=32")


def full_gpu(**arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")


def full_host(**arguments):
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("run", [full_gpu, full_host])
def test_running_out_of_memory_in_a_command_is_an_error(run, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "run", run)
    assert main(["experiments"]) == 2
    assert re.fullmatch(r"error: out of memory \(.*\): lower data\.micro_batch_size, .*\n", capsys.readouterr().err)


def test_a_broken_command_is_a_traceback(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(experiments, "run", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["experiments"])


def test_out_of_memory_is_an_error_that_names_the_remedies(toy, tmp_path, capsys):
    size = ["model.intermediate_size=4000000", "model.num_hidden_layers=999"]
    assert main(last_of_each(["fit", *toy, f"output={tmp_path}", *size])) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory")
    assert "choose a smaller model, data.micro_batch_size or data.seq_len" in error
