"""Documents to sequences: `document` and dtypes here, `packed` in test_chunks, instructions in test_instructions."""

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_lightning.data.encode import DOCUMENT_DTYPE, Encoded, Encoder, concatenate, take_tokens
from cod_lightning.data.tokenizers import load_tokenizer
from cod_lightning.data.workers import worker_pool
from cod_lightning.errors import UserError


@given(
    documents=st.lists(st.lists(st.integers(2, 999), max_size=12), min_size=1, max_size=9), seq_len=st.integers(2, 8)
)
def test_document_sequences_are_cut_before_a_last_eos_or_padded(numbers, documents, seq_len):
    encoded = Encoder(numbers(), "document", seq_len)([" ".join(map(str, document)) for document in documents])
    for sequence, document in zip(encoded.ids.reshape(-1, seq_len).tolist(), documents, strict=True):
        head = document[: seq_len - 1]
        assert sequence == [*head, 1] + [0] * (seq_len - 1 - len(head))
    assert encoded.tokens == np.count_nonzero(encoded.ids)
    assert encoded.max_id == encoded.ids.max()


def test_document_sequences_are_those_of_hugging_face(word_level, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = word_level(tmp_path, ["<pad>", "</s>"], {"eos_token": "</s>"})
    texts = ["the quick brown fox jumps over the lazy dog", "the fox"]
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>", eos_token="</s>"
    )
    expected = reference(texts, max_length=6, truncation=True, padding="max_length")["input_ids"]
    assert Encoder(load_tokenizer(folder), "document", 6)(texts).ids.reshape(-1, 6).tolist() == expected


@pytest.mark.parametrize(
    ("vocab_size", "layout", "seq_len", "dtype"),
    [
        (2**16, "packed", 4, np.uint16),
        (2**16 + 1, "packed", 4, np.uint32),
        (1000, "document", 2**16 + 1, np.uint16),
        (1000, "instructions", 2**16, np.uint16),
        (1000, "instructions", 2**16 + 1, np.uint32),  # the length of a prompt is stored too
    ],
)
def test_sequences_are_stored_in_16_bits_if_all_numbers_fit(numbers, vocab_size, layout, seq_len, dtype):
    assert Encoder(numbers(vocab_size), layout, seq_len).dtype == dtype


def test_a_killed_worker_is_an_error():
    with (
        pytest.raises(UserError, match=r"a worker died: see its error above; if there is none, .* lower data\.workers"),
        worker_pool(1) as executor,
    ):
        executor.submit(os._exit, 1).result()


def test_batches_are_taken_until_the_bound_is_reached():
    batches = [Encoded(np.zeros(5), np.array([(9, 5, 5, 0, b"")], DOCUMENT_DTYPE))] * 10
    assert [len(list(take_tokens(batches, tokens))) for tokens in (10, 11)] == [2, 3]


def test_a_record_has_characters_and_hash_of_the_text_as_it_is(numbers):
    documents = ["5 6\u2003", "7"]
    records = Encoder(numbers(), "packed", 4)(documents).documents
    assert records["characters"].tolist() == [4, 1]
    assert [bytes(each) for each in records["sha256"]] == [hashlib.sha256(d.encode()).digest() for d in documents]


def test_documents_are_split_selected_and_concatenated():
    records = np.zeros(3, DOCUMENT_DTYPE)
    records["numbers"] = [2, 0, 3]
    encoded = Encoded(np.arange(5), records)
    parts = list(encoded.split())
    assert [part.ids.tolist() for part in parts] == [[0, 1], [], [2, 3, 4]]
    assert concatenate(parts).ids.tolist() == [0, 1, 2, 3, 4]
    assert encoded.select(np.array([False, True, True])).ids.tolist() == [2, 3, 4]
    assert list(Encoded(np.arange(0), records[:0]).split()) == []
