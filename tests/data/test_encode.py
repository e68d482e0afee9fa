"""Documents to sequences: `document` and dtypes here, `packed` in test_chunks, instructions in test_instructions."""

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_lightning.data.encode import DOCUMENT_DTYPE, Encoded, Encoder, take_tokens
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


@pytest.mark.parametrize("size", [1, 2, 3, 10])
@pytest.mark.parametrize(("limit", "taken"), [(1, 1), (5, 1), (6, 3), (10, 3), (11, 4), (99, 10)])
def test_documents_are_taken_until_the_bound_is_reached_whatever_the_batches(size, limit, taken):
    """The second document of ten has no tokens, the others have five."""
    records = np.zeros(10, DOCUMENT_DTYPE)
    records["numbers"] = records["tokens"] = [5, 0, *[5] * 8]
    ids = np.repeat(np.arange(10), records["numbers"])
    whole = Encoded(ids, records)
    starts = range(0, 10, size)
    batches = (whole.select((np.arange(10) >= start) & (np.arange(10) < start + size)) for start in starts)
    parts = list(take_tokens(batches, limit))
    assert sum(len(part.documents) for part in parts) == taken
    assert np.concatenate([part.ids for part in parts]).tolist() == ids[ids < taken].tolist()


def test_a_record_has_the_hash_of_the_text_as_it_is(numbers):
    documents = ["5 6\u2003", "7"]
    records = Encoder(numbers(), "packed", 4)(documents).documents
    assert [bytes(each) for each in records["sha256"]] == [hashlib.sha256(d.encode()).digest() for d in documents]


def test_documents_are_selected_with_their_ids():
    records = np.zeros(3, DOCUMENT_DTYPE)
    records["numbers"] = [2, 0, 3]
    encoded = Encoded(np.arange(5), records)
    assert encoded.select(np.array([False, True, True])).ids.tolist() == [2, 3, 4]
