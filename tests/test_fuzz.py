"""Whatever words and files hold: the right answer, or an error that says what is wrong."""

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
from cod_lightning.config.compose import compose, config_folder, fields_and_groups
from cod_lightning.config.saved import load, to_yaml
from cod_lightning.config.schema import Config
from cod_lightning.data.manifest import Chunk, Manifest, Source, Split, TokenizerRecord
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer, train_bpe
from cod_lightning.errors import UserError
from cod_lightning.paper.claims import Column, columns
from cod_lightning.paper.experiments import experiment_rows, load_experiments
from cod_lightning.paper.findings import QUANTITIES, quantity_rows
from cod_lightning.paper.results import load_task_scores
from cod_lightning.train.checkpoint import AtomicCheckpointIO, read_checkpoint
from cod_lightning.train.record import RECORD, read_record

SECRET = "what the environment of this test holds"
DEEP = json.loads("[" * 300 + "]" * 300)
ODD = [None, True, -1, 0, 7, 2**70, 1.5, float("nan"), "", "x", "${oc.env:SECRET}", "\0", [], {}, [[1], 2], {"a": [{}]}]


def few(examples):
    """The same examples every time; fixtures are only read."""
    allowed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, database=None, deadline=None, derandomize=True, suppress_health_check=allowed
    )


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to be in, and a secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", SECRET)
    return tmp_path


# Words --------------------------------------------------------------------------------------------------------------


def names(section, prefix=""):
    for field in fields(section):
        value = getattr(section, field.name)
        yield prefix + field.name
        if is_dataclass(value):
            yield from names(value, f"{prefix}{field.name}.")


KEYS = sorted(
    {*names(Config()), *fields_and_groups(), "norm.position", "norm.base", "paper.rows", "trainer.measures.x"}
)
HOSTILE = [
    *("null", "???", "", "true", "-1", "0", "1e999", "nan", "9" * 40, "[]", "{}", "[1,[2]]", "{a:{b:[c]}}", "{1:2}"),
    *("${oc.env:SECRET}", "[${oc.env:SECRET}]", "{a:${oc.env:SECRET}}", "'${oc.env:SECRET}'", "$\\{oc.env:SECRET\\}"),
    *("${oc.decode:3}", "${seed}", "${", "${}", "\\${seed}", "'", '"', "{", "]", "(", "a b", "a=b", "a,b", "range(3)"),
    *("choice(1,2)", "glob(*)", "sort(2,1)", "int(x)", "str(1)", "extend_list(1)", "json_str({a:1})", "@", "é\u202e😀"),
    *(
        "\udcff",
        "a\0b",
        "../x",
        "/dev/null",
        "a:b",
        ".a:b",
        "lns",
        "os:getcwd",
        "builtins:dict",
        "tiny",
        "gpas",
        "x" * 999,
    ),
]
WORDS = st.one_of(
    st.builds(
        "{}{}{}={}".format,
        st.sampled_from(["", "", "", "+", "++", "~"]),
        st.sampled_from(KEYS),
        st.sampled_from(["", "", "", "", "@norm", "@_global_", "@", ".x", ".0", "."]),
        st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8)),
    ),
    st.text(max_size=12),
)


@few(60)
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_any_words_are_a_configuration_or_an_error(words):
    found = answer(compose, words)
    said = to_yaml(found) if isinstance(found, Config) else str(found)
    assert SECRET not in said
    assert not os.listdir()


# Files --------------------------------------------------------------------------------------------------------------


def mutated(content):
    """Bytes with some flipped, cut off, repeated or put in between."""
    place, some = st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=9)

    def flipped(at, bit):
        return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

    return st.one_of(
        st.builds(flipped, place, st.integers(0, 7)),
        st.builds(lambda at: content[:at], place),
        st.builds(lambda at, other: content[:at] + other + content[at:], place, some),
        st.builds(lambda at, other: content[:at] + other + content[at + len(other) :], place, some),
        st.builds(lambda at, to: content[:at] + content[min(at, to) : max(at, to)] + content[at:], place, place),
    )


def ways(value, way=()):
    """The keys that lead to every part of a JSON value; of a long list to the first two."""
    if way:
        yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in inner:
        yield from ways(part, (*way, key))


def changed(content):
    """A JSON value with a part of another type in it, or without one."""

    def made(way, other, gone):
        value = json.loads(json.dumps(content))
        place = value
        for key in way[:-1]:
            place = place[key]
        if gone:
            del place[way[-1]]
        else:
            place[way[-1]] = other
        return value

    others, gone = st.sampled_from([*ODD, DEEP]), st.sampled_from([False, False, True])
    return st.builds(made, st.sampled_from(list(ways(content))), others, gone)


def either(content, dump=json.dumps):
    """The bytes of a file with this content, damaged in either way."""
    return st.one_of(mutated(dump(content).encode()), changed(content).map(lambda value: dump(value).encode()))


def answer(read, *words):
    """What a reader gives, or its error."""
    try:
        return read(*words)
    except UserError as error:
        return error


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    return one == other


CHECKPOINT = {
    "state_dict": {"decoder.a": torch.arange(300.0), "decoder.b": torch.ones(2, 3, dtype=torch.bfloat16)},
    "tokens": 7,
    "callbacks": {"Recorder": {"history": {"train": {"loss": [1.5, 2.5]}}}},
}


@few(150)
@given(st.data())
def test_a_checkpoint_is_what_was_saved_or_an_error(here, data):
    path = here / "a.ckpt"
    if not path.exists():
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    (here / "b.ckpt").write_bytes(data.draw(mutated(path.read_bytes())))
    for mmap in (False, True):
        found = answer(lambda mmap=mmap: read_checkpoint(here / "b.ckpt", mmap=mmap))
        assert same(found, CHECKPOINT) or "b.ckpt: not a readable checkpoint" in str(found)


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


@few(150)
@given(either(json.loads(WRITTEN), lambda value: json.dumps(value, indent=1)))
def test_a_manifest_is_what_was_written_or_an_error(content):
    found = answer(Manifest.from_json, content.decode(errors="replace"), "manifest.json")
    assert found == MANIFEST or str(found).startswith("manifest.json")


def test_a_manifest_without_its_sha256_has_numbers_that_fit():
    """Sets that were prepared before manifests had one."""
    record = json.loads(WRITTEN)
    del record["sha256"]
    assert Manifest.from_json(json.dumps(record), "manifest.json") == MANIFEST
    for count in (0, -3, 6, 2**70, 2.0, True):
        record["val"]["chunks"][0]["rows"] = record["val"]["rows"] = count
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            Manifest.from_json(json.dumps(record), "manifest.json")


PLAIN = yaml.safe_load(to_yaml(compose(["norm=gpas", "experiments=table1_130m"])))


@few(60)
@given(either(PLAIN, yaml.safe_dump))
def test_a_saved_configuration_is_one_or_an_error(here, content):
    (here / "config.yaml").write_bytes(content)
    found = answer(load, here)
    assert isinstance(found, Config) or "config.yaml" in str(found)
    assert SECRET not in (to_yaml(found) if isinstance(found, Config) else str(found))


TOKENIZER = json.loads(train_bpe(["the norm of a deep block grows with depth " * 9], 280).json)


@few(150)
@given(either(TOKENIZER), st.sampled_from(["<eos>", "<eos>", *ODD]))
def test_a_tokenizer_encodes_or_is_an_error(here, content, eos):
    (here / "tokenizer.json").write_bytes(content)
    (here / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = answer(load_tokenizer, str(here))
    if isinstance(tokenizer, DocumentTokenizer):
        ids = answer(tokenizer.encode, ["the norm"])
        assert isinstance(ids, UserError) or max(ids[0]) < tokenizer.vocab_size


RESULTS = config_folder() / "experiments/results/toy"
FOLDERS = sorted(RESULTS.glob("*/jacobian.json"))
RUN = json.loads((FOLDERS[0].parent / RECORD).read_text())


@few(60)
@given(either(RUN))
def test_a_record_is_shown_or_an_error(here, content):
    (here / RECORD).write_bytes(content)
    found = answer(read_record, here)
    if isinstance(found, UserError):
        assert RECORD in str(found)
    else:
        Console(file=io.StringIO()).print(run_summary(found, here))


@cache
def asked():
    """The rows whose runs were measured; those of the paper's size save composing them again and again."""
    return [row for scale in ("paper", "toy") for row in experiment_rows(["table1_130m", "figure5"], scale)]


FILES = {path.name: json.loads(path.read_text()) for path in FOLDERS[0].parent.glob("*.json")}


@few(25)
@given(st.one_of([st.tuples(st.just(name), changed(FILES[name])) for name in sorted(FILES)]))
def test_results_are_compared_or_an_error(here, one):
    name, content = one
    folder = here / "results/toy/a"
    folder.mkdir(parents=True, exist_ok=True)
    for other, whole in FILES.items():
        (folder / other).write_text(json.dumps(content if other == name else whole))
    found = answer(load_experiments, asked(), here / "results")
    if isinstance(found, UserError):
        assert str(folder / name) in str(found)
        return
    for experiment in found:
        for column in columns([experiment]):
            assert isinstance(column.comparisons, list)
            for target in QUANTITIES:
                quantity_rows(Column((replace(column.first, target=target),)))


@few(60)
@given(st.one_of(changed({"piqa": {"acc": 0.5, "acc_stderr": 0.1}, "boolq": {"acc": 0.25}}), st.sampled_from(ODD)))
def test_scores_are_numbers_or_an_error(here, content):
    (here / "tasks.json").write_text(json.dumps(content))
    found = answer(load_task_scores, here / "tasks.json")
    assert "tasks.json" in str(found) or all(isinstance(value, float) for value in found.values())
