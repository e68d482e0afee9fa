import pytest

from cod_lightning.data.pack import pack_sequences
from cod_lightning.errors import UserError


def encode(text):
    return [ord(letter) for letter in text]


def test_documents_follow_each_other_with_a_separator():
    sequences = pack_sequences(["ab", "cde", "f"], encode, eos_id=0, max_sequences=2, seq_len=3).tolist()
    assert sequences == [[97, 98, 0], [99, 100, 101]]
    (sequence,) = pack_sequences(["ab", "cde"], encode, eos_id=None, max_sequences=1, seq_len=4).tolist()
    assert sequence == [97, 98, 99, 100]


def test_every_sequence_begins_with_the_start():
    sequences = pack_sequences(["abc", "defg"], encode, eos_id=0, max_sequences=9, seq_len=3, bos_id=7).tolist()
    assert sequences == [[7, 97, 98], [7, 99, 0], [7, 100, 101], [7, 102, 103]]


def test_documents_are_read_only_as_far_as_needed():
    def documents():
        yield "abcdef"
        raise AssertionError

    assert pack_sequences(documents(), encode, eos_id=0, max_sequences=2, seq_len=3).shape == (2, 3)


def test_too_few_tokens_return_fewer_sequences_or_an_error():
    assert pack_sequences(["abcd"], encode, eos_id=0, max_sequences=9, seq_len=2).shape == (2, 2)
    with pytest.raises(UserError, match=r"have 3 tokens, less than one sequence of data\.seq_len=4"):
        pack_sequences(["ab"], encode, eos_id=0, max_sequences=1, seq_len=4)
