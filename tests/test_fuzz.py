"""Random command lines and damaged files give a correct result or a `UserError`."""

import io
import json
import os
from dataclasses import fields, is_dataclass, replace
from functools import cache

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from cod_lightning.commands.terminal import run_summary
from cod_lightning.config.compose import compose, config_folder
from cod_lightning.config.groups import fields_and_groups
from cod_lightning.config.saved import load_config, to_yaml
from cod_lightning.config.schema import Config
from cod_lightning.data.manifest import Chunk, Manifest, Source, Split, TokenizerRecord
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer, train_bpe
from cod_lightning.errors import UserError
from cod_lightning.paper.claims import Column, group_columns
from cod_lightning.paper.experiments import experiment_rows, with_results
from cod_lightning.paper.findings import QUANTITIES, quantity_rows
from cod_lightning.paper.results import load_runs, load_task_scores
from cod_lightning.train.checkpoint import AtomicCheckpointIO, read_checkpoint, read_for_weights
from cod_lightning.train.record import RECORD, read_record

SECRET = "a value of the environment"
DEEP = json.loads("[" * 300 + "]" * 300)
ODD = [None, True, -1, 0, 7, 2**70, 1.5, float("nan"), "", "x", "${oc.env:SECRET}", "\0", [], {}, [[1], 2], {"a": [{}]}]


def fuzz(examples):
    """Settings for a number of examples, the same in every run; tests may share fixtures between examples."""
    allowed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, database=None, deadline=None, derandomize=True, suppress_health_check=allowed
    )


@pytest.fixture(autouse=True)
def empty_folder_and_secret(tmp_path, monkeypatch):
    """Work in an empty folder, with a secret in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", SECRET)


# Overrides ----------------------------------------------------------------------------------------------------------


def field_names(section, prefix=""):
    for field in fields(section):
        value = getattr(section, field.name)
        yield prefix + field.name
        if is_dataclass(value):
            yield from field_names(value, f"{prefix}{field.name}.")


KEYS = sorted(
    {*field_names(Config()), *fields_and_groups(), "norm.position", "norm.base", "paper.rows", "trainer.measures.x"}
)
HOSTILE = [
    *("null", "???", "", "true", "-1", "0", "1e999", "nan", "9" * 40, "[]", "{}", "[1,[2]]", "{a:{b:[c]}}", "{1:2}"),
    *("${oc.env:SECRET}", "[${oc.env:SECRET}]", "{a:${oc.env:SECRET}}", "'${oc.env:SECRET}'", "$\\{oc.env:SECRET\\}"),
    *("${oc.decode:3}", "${seed}", "${", "${}", "\\${seed}", "'", '"', "{", "]", "(", "a b", "a=b", "a,b", "range(3)"),
    *("choice(1,2)", "glob(*)", "sort(2,1)", "int(x)", "str(1)", "extend_list(1)", "json_str({a:1})", "@", "é\u202e😀"),
    *("\udcff", "a\0b", "../x", "/dev/null", "a:b", ".a:b", "lns", "os:getcwd", "builtins:dict", "tiny", "gpas"),
    "x" * 999,
]
OVERRIDES = st.one_of(
    st.builds(
        "{}{}{}={}".format,
        st.sampled_from(["", "", "", "+", "++", "~"]),
        st.sampled_from(KEYS),
        st.sampled_from(["", "", "", "", "@norm", "@_global_", "@", ".x", ".0", "."]),
        st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8)),
    ),
    st.text(max_size=12),
)


@fuzz(60)
@given(st.lists(OVERRIDES, min_size=1, max_size=4))
def test_overrides_compose_or_raise_without_secrets_and_files(overrides):
    result = result_or_error(compose, overrides)
    assert SECRET not in (to_yaml(result) if isinstance(result, Config) else str(result))
    assert not os.listdir()


# Files --------------------------------------------------------------------------------------------------------------


def mutated_bytes(content):
    """Bytes with a flipped bit, a truncated end, an insertion, an overwrite, or a repeated or missing part."""
    place, some = st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=9)

    def flip_bit(at, bit):
        return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

    return st.one_of(
        st.builds(flip_bit, place, st.integers(0, 7)),
        st.builds(lambda at: content[:at], place),
        st.builds(lambda at, other: content[:at] + other + content[at:], place, some),
        st.builds(lambda at, other: content[:at] + other + content[at + len(other) :], place, some),
        st.builds(lambda at, to: content[:at] + content[min(at, to) : max(at, to)] + content[at:], place, place),
    )


def key_paths(value, path=()):
    """The keys that lead to every part of a JSON value; only the first two elements of a list count."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in inner:
        yield from key_paths(part, (*path, key))


def mutated_json(content):
    """A JSON value with one part removed or replaced by an odd value."""

    def mutate(path, other, removed):
        value = json.loads(json.dumps(content))
        place = value
        for key in path[:-1]:
            place = place[key]
        if removed:
            del place[path[-1]]
        else:
            place[path[-1]] = other
        return value

    others, removed = st.sampled_from([*ODD, DEEP]), st.sampled_from([False, False, True])
    return st.builds(mutate, st.sampled_from(list(key_paths(content))), others, removed)


def damaged_file(content, dump=json.dumps):
    """The bytes of a file with this content, changed as bytes or as JSON."""
    return st.one_of(
        mutated_bytes(dump(content).encode()), mutated_json(content).map(lambda value: dump(value).encode())
    )


def result_or_error(read, *arguments, **options):
    """Call `read`; return its result, or its `UserError`."""
    try:
        return read(*arguments, **options)
    except UserError as error:
        return error


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    return one == other


CHECKPOINT = {
    "state_dict": {"decoder.a": torch.arange(300.0), "decoder.b": torch.ones(2, 3, dtype=torch.bfloat16)},
    "tokens": 7,
    "callbacks": {"Recorder": {"history": {"train": {"loss": [1.5, 2.5]}}}},
}


@fuzz(150)
@given(st.data())
def test_a_damaged_checkpoint_is_read_unchanged_or_an_error(tmp_path, data):
    path = tmp_path / "a.ckpt"
    if not path.exists():
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    (tmp_path / "b.ckpt").write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    for read in (read_checkpoint, read_for_weights):
        result = result_or_error(read, tmp_path / "b.ckpt")
        assert equal(result, CHECKPOINT) or "b.ckpt: damaged, not a readable checkpoint" in str(result)


MANIFEST = Manifest(
    format=1,
    tokenizer=TokenizerRecord("bpe", "ab" * 32, 300, 0, 1, 300),
    source=Source("files", "cd" * 32, {"train": 9, "val": 1}),
    layout="packed",
    seq_len=32,
    dtype="uint16",
    train=Split(5, 160, 299, (Chunk("chunk-0-0.bin", 3, 220, "ef" * 32), Chunk("chunk-0-1.bin", 2, 150, "01" * 32))),
    val=Split(1, 32, 20, (Chunk("chunk-0-0.bin", 1, 80, "23" * 32),)),
)
WRITTEN = MANIFEST.to_json()


@fuzz(150)
@given(damaged_file(json.loads(WRITTEN), lambda value: json.dumps(value, indent=1)))
def test_a_damaged_manifest_is_read_unchanged_or_an_error(content):
    result = result_or_error(Manifest.from_json, content.decode(errors="replace"), "manifest.json")
    assert result == MANIFEST or str(result).startswith("manifest.json")


@pytest.mark.parametrize("count", [0, -3, 6, 2**70, 2.0, True])
def test_a_manifest_needs_consistent_counts_even_if_its_hashes_match(count):
    chunk = replace(MANIFEST.val.chunks[0], rows=count)
    written = replace(MANIFEST, val=replace(MANIFEST.val, rows=count, chunks=(chunk,))).to_json()
    with pytest.raises(UserError, match=r"manifest\.json is damaged \((?!its fingerprint)"):
        Manifest.from_json(written, "manifest.json")


PLAIN = yaml.safe_load(to_yaml(compose(["norm=gpas", "experiments=table1_130m"])))


@fuzz(60)
@given(damaged_file(PLAIN, yaml.safe_dump))
def test_a_damaged_configuration_loads_without_secrets_or_is_an_error(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    result = result_or_error(load_config, tmp_path)
    assert isinstance(result, Config) or "config.yaml" in str(result)
    assert SECRET not in (to_yaml(result) if isinstance(result, Config) else str(result))


TOKENIZER = json.loads(train_bpe(["the norm of a deep block grows with depth " * 9], 280).json)


@fuzz(150)
@given(damaged_file(TOKENIZER), st.sampled_from(["<eos>", "<eos>", *ODD]))
def test_a_damaged_tokenizer_encodes_or_is_an_error(tmp_path, content, eos):
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = result_or_error(load_tokenizer, str(tmp_path))
    if isinstance(tokenizer, DocumentTokenizer):
        ids = result_or_error(tokenizer.encode, ["the norm"])
        assert isinstance(ids, UserError) or max(ids[0]) < tokenizer.vocab_size


RESULTS = config_folder() / "experiments/results/toy"
FOLDERS = sorted(RESULTS.glob("*/jacobian.json"))
FILES = {path.name: json.loads(path.read_text()) for folder in FOLDERS[:1] for path in folder.parent.glob("*.json")}
needs_results = pytest.mark.skipif(not FILES, reason="no measured runs in experiments/results/toy")


@needs_results
@fuzz(60)
@given(damaged_file(FILES.get(RECORD)))
def test_a_damaged_record_is_shown_or_an_error(tmp_path, content):
    (tmp_path / RECORD).write_bytes(content)
    result = result_or_error(read_record, tmp_path)
    if isinstance(result, UserError):
        assert RECORD in str(result)
    else:
        Console(file=io.StringIO()).print(run_summary(result, tmp_path))


@cache
def measured_rows():
    """Rows with measured runs, composed once."""
    return [row for scale in ("paper", "toy") for row in experiment_rows(["table1_130m", "figure5"], scale)]


@needs_results
@fuzz(25)
@given(st.one_of([st.tuples(st.just(name), mutated_json(FILES[name])) for name in sorted(FILES)]))
def test_damaged_results_are_compared_or_an_error(tmp_path, damaged):
    name, content = damaged
    folder = tmp_path / "results/toy/a"
    folder.mkdir(parents=True, exist_ok=True)
    for other, whole in FILES.items():
        (folder / other).write_text(json.dumps(content if other == name else whole))
    result = result_or_error(lambda: with_results(measured_rows(), load_runs(tmp_path / "results")))
    if isinstance(result, UserError):
        assert str(folder / name) in str(result)
        return
    for experiment in result:
        for column in group_columns([experiment]):
            assert isinstance(column.comparisons, list)
            for target in QUANTITIES:
                quantity_rows(Column((replace(column.first, target=target),)))


@fuzz(60)
@given(st.one_of(mutated_json({"piqa": {"acc": 0.5, "acc_stderr": 0.1}, "boolq": {"acc": 0.25}}), st.sampled_from(ODD)))
def test_damaged_task_scores_are_floats_or_an_error(tmp_path, content):
    (tmp_path / "tasks.json").write_text(json.dumps(content))
    result = result_or_error(load_task_scores, tmp_path / "tasks.json")
    assert "tasks.json" in str(result) or all(isinstance(value, float) for value in result.values())
