import pytest

from cod_lightning.data.pack import packed
from cod_lightning.errors import UserError


def encode(text):
    return [ord(letter) for letter in text]


def test_documents_follow_each_other_with_a_separator():
    assert packed(["ab", "cde", "f"], encode, 0, limit=2, length=3).tolist() == [[97, 98, 0], [99, 100, 101]]
    assert packed(["ab", "cde"], encode, None, limit=1, length=4).tolist() == [[97, 98, 99, 100]]


def test_every_sequence_begins_with_the_start():
    sequences = packed(["abc", "defg"], encode, 0, limit=9, length=3, start=7).tolist()
    assert sequences == [[7, 97, 98], [7, 99, 0], [7, 100, 101], [7, 102, 103]]


def test_documents_are_read_only_as_far_as_needed():
    def documents():
        yield "abcdef"
        raise AssertionError

    assert packed(documents(), encode, 0, limit=2, length=3).shape == (2, 3)


def test_too_few_tokens_return_fewer_sequences_or_an_error():
    assert packed(["abcd"], encode, 0, limit=9, length=2).shape == (2, 2)
    with pytest.raises(UserError, match=r"have 3 tokens, less than one sequence of data\.seq_len=4"):
        packed(["ab"], encode, 0, limit=1, length=4)
