"""README.md and docs/: commands that compose, messages that the source still has, tables, links, the site."""

import ast
import csv
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import cod_lightning as cod
from cod_lightning.cli import COMMANDS, parser
from cod_lightning.commands import estimate as estimate_command
from cod_lightning.commands.measure import is_model, split_options
from cod_lightning.config.compose import choices, compose, groups, sweep
from cod_lightning.errors import UserError
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder, set_step
from cod_lightning.nn.huggingface import unsupported_features
from cod_lightning.nn.strategies import LNS_POSITIONS, STRATEGIES, build_all
from cod_lightning.paper.figures import ROW_STRATEGIES
from cod_lightning.train.estimate import GPUS, estimate
from tiny_models import tiny_llama

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SCALING, TROUBLE = PAGES["scaling.md"], PAGES["troubleshooting.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|^((?: {4}[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"-m cod_lightning (.*?)(?:  +#.*)?$", re.MULTILINE)
TYPED = {
    command: name
    for name, text in PAGES.items()
    if name != "audit.md"  # tests/test_audit.py fills in its variables
    for _, fenced, indented in BLOCK.findall(text.replace("\\\n", ""))
    for command in COMMAND.findall(fenced + indented)
}
"""The page of every command."""
PYTHON = [
    pytest.param(code, id=f"{name}: {code.splitlines()[0]}")
    for name, text in PAGES.items()
    for language, code, _ in BLOCK.findall(text)
    if language == "python"
]
HEADLINES = re.findall(r"^\*\*(.*?)\*\*( \([\w ]+\))?:", TROUBLE, flags=re.MULTILINE)
OURS = [message for headline, origin in HEADLINES if not origin for message in re.findall(r"`(.*?)`", headline)]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The strategy that the README defines, importable under the name it is given there."""
    code = re.search(r"^    # my_package/norms\.py\n(.*?)\n    python", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    assert code
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "norms.py").write_text(textwrap.dedent(code[1]))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("command", TYPED, ids=lambda command: f"{TYPED[command]}: {command}")
@pytest.mark.usefixtures("example")
def test_every_command_is_understood(command):
    wrapped = command.count("'") % 2  # the end of sbatch --wrap='...'
    arguments = parser().parse_args(shlex.split(command[:-1] if wrapped else command))
    known = {"tasks", "shard", "merge", *(estimate_command.OPTIONS if arguments.command == "estimate" else ())}
    words = [word for word in getattr(arguments, "overrides", []) if word.partition("=")[0] not in known]
    if arguments.command == "measure":
        words = [word for word in arguments.words if not is_model(word)]
        words = split_options(words, arguments.study)[1]
    if "data=files" in words:
        words = [word for word in words if not word.startswith("data.files")] + ["data.files=texts/a.txt"]
    for run in sweep(words):
        compose(run)


def test_the_page_of_the_command_line_has_every_command():
    commands = re.findall(r"^python -m cod_lightning (\w+)", PAGES["command_line.md"], re.MULTILINE)
    assert set(commands) == set(COMMANDS)


def test_the_guide_has_commands_of_every_step():
    commands = re.findall(r"^ {4}.*-m cod_lightning (\w+)", SCALING.replace("\\\n", ""), re.MULTILINE)
    assert set(commands) == {"fit", "prepare", "estimate", "consolidate"}


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_use_public_names(code):
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in names if isinstance(node.value, ast.Name) and node.value.id == "cod"}
    assert used <= set(cod.__all__)


def test_the_guide_builds_optimizer_groups(capsys):
    pytest.importorskip("transformers")
    (code,) = (block for _, block, _ in BLOCK.findall(PAGES["own_training.md"]) if "groups = cod.param_groups" in block)
    exec(compile(code, "own_training.md", "exec"), {})
    assert capsys.readouterr().out.count("weight_decay x") == 3  # blocks 2, 3 and 4


@pytest.mark.parametrize("model", ["nn.TransformerEncoder(", "ViTForImageClassification("])
def test_the_layouts_of_the_guide_hold(model):
    if model.startswith("ViT"):
        pytest.importorskip("transformers", minversion="5")
    (code,) = (block for _, block, _ in BLOCK.findall(PAGES["own_training.md"]) if model in block)
    exec(compile(code, "own_training.md", "exec"), {})


def is_refused(norm):
    try:
        cod.apply(tiny_llama(depth=4), norm)
    except UserError:
        return True
    return False


def test_the_table_of_refusals_has_every_strategy_that_apply_refuses():
    pytest.importorskip("transformers")
    table = PAGES["own_training.md"].partition("### Refused")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(filter(is_refused, STRATEGIES))


def test_the_table_of_studies_has_every_measure():
    lines = re.findall(r"^\| (\w+) \| .* \| (`\w+`(?: `\w+`)*) \|$", PAGES["measure.md"], re.MULTILINE)
    listed = {name: study for study, names in lines for name in re.findall(r"`(\w+)`", names)}
    assert listed == {name: entry.study for name, entry in MEASURES.items()}


def test_the_api_has_every_measure_and_its_result():
    entry = re.compile(r"^::: (cod_lightning\.measure\.\S+)\n    options: {heading: cod\.measure\.(\w+)", re.MULTILINE)
    functions = {name: path for path, name in entry.findall(PAGES["api.md"])}
    assert functions == {name: f"{each.measure.__module__}.{each.measure.__name__}" for name, each in MEASURES.items()}
    results = {f"{each.result_type.__module__}.{each.result_type.__name__}" for each in MEASURES.values()}
    assert results <= set(re.findall(r"^::: (\S+)", PAGES["api.md"], re.MULTILINE))


def test_the_settings_table_has_every_group_and_choice():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGES["reproduce.md"], flags=re.MULTILINE))
    assert set(groups()) == set(rows)
    for group in groups():
        if group != "model":
            assert all(f"`{name}`" in rows[group] for name in choices(group)), group
    assert all(f"`{name}`" in rows["norm"] for name in STRATEGIES)


def decoder_of(norm, depth=4, **options):
    """A decoder at a step after the end of every schedule."""
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(8, 16, depth, 2, vocab_size=8), build_all({"name": norm, **options}, depth))
    set_step(decoder, 10**6)
    return decoder


def block_parameters(norm):
    """Parameters that a block more adds to a decoder of width 8."""
    five, four = (sum(parameter.numel() for parameter in decoder_of(norm, depth).parameters()) for depth in (5, 4))
    return five - four


def test_the_strategy_table_has_parameters_and_folding_of_every_strategy():
    lines = re.findall(r"^\| `(\w+)` \| .* \| .* \| (.*?) \| (yes|no) \| .* \|$", PAGES["strategies.md"], re.MULTILINE)
    pre_ln = block_parameters("pre_ln")
    measured = [
        (name, block_parameters(name) - pre_ln, "no" if unsupported_features(decoder_of(name)) else "yes")
        for name in STRATEGIES
    ]
    counts = {
        "0": 0,
        "1": 1,
        "2": 2,
        "2d": 16,
        "-2d": -16,
        "2K": 8,
        "3": 3,
        "2 + 2d": 18,
        "4 + 2d": 20,
        "3K - d": 4,
        "2 - 2d": -14,
    }
    assert [(name, counts[added.partition(",")[0]], folds) for name, added, folds in lines] == measured


def read_csv(path):
    with open(ROOT / path, newline="") as file:
        return list(csv.DictReader(file))


def measured_losses(name_of):
    """Differences to Pre-LN at scale=small by the name that a row of the report has in the docs, or None."""
    return {
        name_of(row): f"{float(row['difference']):+.3f}"
        + (f" ± {float(row['margin_95']):.3f}" if row["margin_95"] else "")
        + f" ({row['pairs']})"
        for row in read_csv("experiments/results/reproduction.csv")
        if row["scale"] == "small" and row["difference"] and name_of(row)
    }


def strategy_of(row):
    """The strategy of a row of the report that was trained with the rate of Table 1."""
    strategy = ROW_STRATEGIES.get(row["row"], row["row"])
    return strategy if row["experiment"] in ("league_same", "why_lns") and strategy in STRATEGIES else None


def position_of(row):
    """The position of LNS of a row of Table 8."""
    if row["experiment"] != "table8_130m":
        return None
    return "after_ln" if row["row"] == "lns" else row["row"]


def test_the_strategy_table_has_the_measured_memory_and_losses():
    (costs,) = (ROOT / "benchmarks/results").glob("*_strategies.csv")
    memory = {row["strategy"]: f"{float(row['memory']):.2f}" for row in read_csv(costs)}
    lines = re.findall(r"^\| `(\w+)` \| .* \| (?:yes|no) \| (.*?) \|(.*?)\| ", PAGES["strategies.md"], re.MULTILINE)
    assert {name: cost for name, cost, _ in lines if name in STRATEGIES} == memory
    assert {name: loss.strip() for name, _, loss in lines if name in STRATEGIES and loss.strip()} == measured_losses(
        strategy_of
    )


@pytest.mark.parametrize("name", PAGES)
def test_the_rows_of_a_table_have_as_many_cells_as_its_header(name):
    for table in re.findall(r"(?:^\|.*\n)+", PAGES[name], re.MULTILINE):
        header, *rows = (re.split(r"(?<!\\)\|", line) for line in table.splitlines())
        assert [row for row in rows if len(row) != len(header)] == []


def test_the_table_of_positions_has_folding_and_losses():
    lines = re.findall(r"^\| `(\w+)`.*? \| .* \| (yes|no) \| (.*?) \|$", PAGES["strategies.md"], re.MULTILINE)
    positions = {name: (folds, loss) for name, folds, loss in lines if name in LNS_POSITIONS}
    losses = measured_losses(position_of)
    assert positions == {
        name: ("no" if unsupported_features(decoder_of("lns", position=name)) else "yes", losses[name])
        for name in LNS_POSITIONS
    }


def test_the_api_page_has_every_public_name():
    documented = set(re.findall(r"^::: cod_lightning\.(\w+)$", PAGES["api.md"], re.MULTILINE))
    assert documented == set(cod.__all__) - {"__version__"}


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'id="cod_lightning.apply"' in (tmp_path / "api.html").read_text()


def texts():
    """Every string of the package, with line breaks where values are filled in."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_of_ours_is_one():
    assert len(OURS) > 25
    found = list(texts())
    for message in OURS:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(pattern.search(text) for text in found), message


COLUMNS = [
    *(("single", 1, "none"), ("ddp", 8, "none"), ("fsdp", 8, "none")),
    *(("fsdp", 8, "selective"), ("fsdp", 8, "full")),
]
"""Strategy, ranks and checkpointing of the tables' columns."""
composed = lru_cache(lambda *words: compose(words))


def rows_of(width):
    """Rows of the guide's tables of so many cells, a name that is left out filled in."""
    name = ""
    for line in re.findall(r"^\|(.*)\|$", SCALING, flags=re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != width or not re.fullmatch(r"[\d.]+", cells[-1]):
            continue
        if named := re.match(r"`(\w+)`", cells[0]):
            name = named[1]
        yield name, *cells[1:]


def needs(words, strategy, gpus, checkpointing, hardware="h100"):
    return estimate(composed(*words), strategy=strategy, gpus=gpus, checkpointing=checkpointing, hardware=hardware)


def test_the_table_of_memory_is_what_estimate_says(monkeypatch):
    monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory=0))  # no search for the largest micro-batch
    rows = list(rows_of(7))
    assert len(rows) == 10
    for name, size, *figures in rows:
        words = [f"experiments={name}", f"data.micro_batch_size={size}"]
        assert [f"{needs(words, *column).memory.total / 1e9:.1f}" for column in COLUMNS] == figures, (name, size)


def test_the_table_of_micro_batches_is_what_estimate_says():
    rows = list(rows_of(8))
    assert len(rows) == 12
    for name, hardware, *figures, hours in rows:
        words = [f"experiments={name}", "data.micro_batch_size=1"]
        found = [needs(words, *column, hardware.lower()) for column in COLUMNS]
        assert [str(one.max_micro_batch_size) for one in found] == figures, (name, hardware)
        assert f"{found[0].gpu_hours:.1f}" == hours


def anchors(text):
    """Anchors of the headings of a page, and of the objects that it documents."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r"^::: (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("path", [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)]*)\)", BLOCK.sub("", path.read_text())):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            leads_to = path.parent / name if name else path
            assert leads_to.exists(), target
            assert not anchor or anchor in anchors(leads_to.read_text()), target


def test_the_guides_name_existing_settings():
    from dataclasses import asdict

    from cod_lightning.config.schema import Config, flatten

    fields = flatten(asdict(Config())).keys() | {"trainer.measures.jacobian", "trainer.measures.angular"}
    guides = "".join(text for name, text in PAGES.items() if name != "audit.md")
    named = set(re.findall(r"\b((?:model|data|optim|trainer|images)\.[a-z_]+(?:\.[a-z]+)?)=", guides))
    assert len(named) > 20
    assert named <= fields, named - fields
