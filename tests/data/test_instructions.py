"""Instructions: prompts, sequences with the start of the answer, and bad records."""

import gzip
import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from cod_lightning.data.config import DataConfig
from cod_lightning.data.corpora import open_corpus, text_identity
from cod_lightning.data.encode import Encoder
from cod_lightning.data.instructions import ALIVE, LIFELESS, Example, drawn, prompt_of
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import check_against, prepare, prepared_folder
from cod_lightning.data.readers import read_examples
from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE, next_tokens

RECORDS = [
    {"instruction": f"Is {n} even?", "input": "", "output": f"the correct answer is {n % 2 == 0}", "answer": "x"}
    for n in range(40)
]


def write(path, records, kind="list"):
    text = json.dumps(records) if kind == "list" else "\n".join(json.dumps(record) for record in records) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_the_prompt_is_that_of_stanford_alpaca():
    assert prompt_of("Add.", "1 and 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n"
    )
    assert prompt_of("Add 1 and 2.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("a.json", "list"), ("a.json.gz", "list"), ("a.jsonl", "lines"), ("a.json.gz", "lines")]
)
def test_records_are_read_from_a_list_and_from_lines(tmp_path, name, kind):
    records = [*RECORDS[:3], {"instruction": "Add.", "input": "1\n2", "output": "3"}]
    examples = list(read_examples(write(tmp_path / name, records, kind)))
    assert [example.parts for example in examples] == [
        *((prompt_of(record["instruction"]), record["output"]) for record in records[:3]),
        (prompt_of("Add.", "1\n2"), "3"),
    ]


def test_an_example_is_a_text_that_survives_a_copy():
    example = Example("a prompt, ", "an answer")
    copy = pickle.loads(pickle.dumps(example))
    assert example == copy == "a prompt, an answer"
    assert copy.parts == ("a prompt, ", "an answer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"a\.json: not JSON"),
        ('{"instruction": "a", "output": "b"}\n{', r"a\.json, line 2: not JSON"),
        ('[{"instruction": "a", "output": "b"}, 3]', r'a\.json, record 2: no string in the field "instruction"'),
        ('{"instruction": "a", "answer": "b"}', r'a\.json, line 1: no string in the field "output"'),
        ('{"instruction": "a", "input": 3, "output": "b"}', r'line 1: no string in the field "input"'),
        ('{"instruction": " ", "output": "b"}', r'line 1: the field "instruction" is empty'),
        ('{"instruction": "a", "output": ""}', r'line 1: the field "output" is empty'),
        ('{"instruction": "a", "output": "\\ud800"}', r"line 1: not valid Unicode"),
    ],
)
def test_a_bad_record_is_refused_by_place_and_field(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_examples(tmp_path / "a.json"))


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    config = DataConfig(source="instructions", files=str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"a\.txt is not one of \.jsonl, \.json"):
        list(open_corpus(config).train())


def test_a_sequence_is_prompt_answer_eos_pads_and_the_length_of_the_prompt(numbers):
    encoder = Encoder(numbers(), "instructions", 6)
    parts = [
        ("5 6 7", "8 9"),
        ("5", "8"),
        ("5 6 7 8", "9 10 11"),
        ("5 6 7 8 9", "10"),
        ("2 3 4 5 6 7", "999"),
        ("2", "3"),
    ]
    encoded = encoder([Example(*pair) for pair in parts])
    assert encoded.ids.reshape(-1, 7).tolist() == [
        [5, 6, 7, 8, 9, 1, 3],
        [5, 8, 1, 0, 0, 0, 1],
        [5, 6, 7, 8, 9, 10, 4],  # cut: the answer does not end here, so there is no EOS
        [5, 6, 7, 8, 9, 10, 5],
        # The fifth has no room for its answer.
        [2, 3, 1, 0, 0, 0, 1],
    ]
    assert encoder.count_truncated_answers(encoded) == 2
    assert (encoded.tokens, encoded.max_id) == (6 + 3 + 6 + 6 + 3, 10)
    assert encoder([Example("2 3 4 5 6 7", "8")]).ids.size == 0


def test_targets_are_the_answer_and_its_eos():
    sequences = torch.tensor([[5, 6, 7, 8, 9, 1, 3], [5, 8, 1, 0, 0, 0, 1], [5, 6, 7, 8, 9, 10, 5]])
    _ = IGNORE
    assert next_tokens(sequences[:, :6], 0, sequences[:, 6]).tolist() == [
        [_, _, 8, 9, 1, _],
        [8, 1, _, _, _, _],
        [_, _, _, _, 10, _],
    ]


@pytest.fixture(scope="module")
def instructions(make_config, tmp_path_factory):
    """The settings of a prepared set; the prompt of one example is too long. Read only."""
    folder = tmp_path_factory.mktemp("instructions")
    write(folder / "a.json", [*RECORDS, {"instruction": "word " * 300, "output": "no room"}])
    config = make_config(folder, source="instructions", files=str(folder / "*.json"), seq_len=100)
    prepare(config)
    return config


def test_a_prepared_set_has_every_example_and_the_start_of_its_answer(instructions, open_tokens):
    data = open_tokens(instructions)
    sequences = data.train_set.read(np.arange(len(data.train_set)))
    assert sequences.shape == (36, 101)
    backend, parts = data.tokenizer.backend, []
    for sequence in sequences.tolist():
        *ids, start = sequence
        end = ids.index(data.tokenizer.eos_id)
        assert set(ids[end + 1 :]) <= {data.tokenizer.pad_id}
        parts.append((backend.decode(ids[:start]), backend.decode(ids[start:end])))
    examples = [Example(prompt_of(record["instruction"]), record["output"]) for record in RECORDS]
    assert parts == [example.parts for number, example in enumerate(examples, 1) if number % 10]


def test_the_manifest_counts_skipped_examples_and_has_format_2(instructions, packed):
    manifest = read_manifest(prepared_folder(instructions))
    assert (manifest.format, manifest.layout, manifest.seq_len, manifest.row_width) == (2, "instructions", 100, 101)
    assert manifest.source.documents == {"train": 37, "val": 4}
    assert (manifest.train.rows, manifest.val.rows) == (36, 4)
    text = read_manifest(prepared_folder(packed))
    assert (text.format, text.row_width) == (1, text.seq_len)


def test_the_report_counts_skipped_examples_and_cut_answers(instructions, tmp_path, capfd):
    prepare(replace(instructions, root=str(tmp_path)))
    printed = capfd.readouterr().err
    assert "36 training and 4 validation sequences (1 examples skipped, whose prompts" in printed
    assert "; 0 answers cut there)" in printed


def test_the_names_of_other_sets_are_stable():
    """Names equal those before instructions existed; instructions ignore `layout`."""
    c4 = DataConfig(source="c4", layout="document", seq_len=256, tokenizer="t5-base")
    assert prepared_folder(c4).name == "c4-043278c65601"
    assert prepared_folder(DataConfig(source="c4")).name == "c4-e8ce030ff821"
    packed, unpacked = (DataConfig(source="drawn_instructions", layout=layout) for layout in ("packed", "document"))
    assert prepared_folder(packed) == prepared_folder(unpacked)
    assert prepared_folder(replace(packed, val_every=7)) != prepared_folder(packed)


def test_instructions_and_text_are_not_confused(instructions, packed, open_tokens):
    with pytest.raises(UserError, match=r"data\.source='files', but the set has 'instructions'"):
        check_against(packed, read_manifest(prepared_folder(instructions)), "here")
    with pytest.raises(UserError, match=r"data\.source='instructions', but the set has 'packed'"):
        check_against(replace(instructions, seq_len=32), read_manifest(prepared_folder(packed)), "here")
    given = replace(instructions, files=None, folder=str(prepared_folder(instructions)))
    open_tokens(given)


def test_batches_include_the_length_of_the_prompt(instructions, open_tokens):
    data = open_tokens(instructions, world_size=2)
    assert next(iter(data.train_dataloader())).shape == (4, 101)
    ((sequences, index),) = data.val_dataloader()
    assert index.tolist() == [0, 2, -1, -1]
    assert (sequences[2:] == data.tokenizer.pad_id).all()


def test_probe_and_token_count_exclude_the_length_of_the_prompt(instructions, open_tokens):
    data = open_tokens(instructions)
    probe = data.probe_batch(4)
    assert torch.equal(probe, data.val_set.read(np.arange(4))[:, :100])
    tokens = (probe != data.tokenizer.pad_id).sum(1)
    assert open_tokens(replace(instructions, val_tokens=int(tokens[:3].sum()))).val_count == 3


def test_drawn_questions_are_always_the_same():
    content = json.dumps(list(drawn())).encode()
    assert hashlib.sha256(content).hexdigest() == "ab325d54fe2f883c03a1f32cba7aac4087ab1d03d78de5033f5be49b79931420"
    assert json.dumps(list(drawn(seed=2))).encode() != content


def test_drawn_answers_are_balanced():
    answers = [record["answer"] for record in drawn()]
    assert len(answers) == 4_000
    for answer in ("true", "false", "answer1", "answer2", "answer3", "answer4"):
        assert answers.count(answer) / 4_000 == pytest.approx(1 / 4 if answer in ("true", "false") else 1 / 8, abs=0.02)


def test_drawn_answers_are_right():
    for record in drawn():
        assert record["output"] == f"the correct answer is {record['answer']}"
        question, _, options = record["instruction"].partition("\n\nAnswer format: ")
        assert record["answer"] in options.split("/")
        words = question.replace("?", "").split()
        if "true" in options:
            noun = words[words.index("the") + 1]
            assert noun in (ALIVE if record["answer"] == "true" else LIFELESS)
        else:
            nouns = [words[words.index(f"{option.title()}:") + 1] for option in options.split("/")]
            assert [noun in ALIVE for noun in nouns] == [o == record["answer"] for o in options.split("/")]


def test_both_kinds_of_questions_are_held_out():
    config = DataConfig(source="drawn_instructions", val_every=10, max_documents=7)
    corpus = open_corpus(config)
    assert len(list(corpus.train())) == 7
    held_out = [example.parts[1] for example in corpus.val()]
    assert len(held_out) == 400
    assert 120 < sum(answer.endswith(("true", "false")) for answer in held_out) < 280
    assert text_identity(config)["val_every"] == 10
