import json

import pytest
from tokenizers import Tokenizer, models

from cod_lightning.data import tokenizers as tokenizers_room
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer, train_bpe, with_pad_below
from cod_lightning.errors import UserError

TEXT = ["the quick brown fox jumps over the lazy dog"] * 50 + ["ein schönes Wörtchen, ça va? 你好"] * 5


def test_bpe_is_byte_identical_when_repeated():
    first, second = train_bpe(TEXT, 300), train_bpe(iter(TEXT), 300)
    assert first == second
    assert (first.pad_id, first.eos_id, first.vocab_size) == (0, 1, 300)
    assert first.sha256 == second.sha256
    assert first.sha256 != train_bpe(TEXT, 290).sha256


def test_bpe_encodes_any_text_and_ends_it_once():
    tokenizer = train_bpe(TEXT, 300)
    documents = ["the fox", "never seen: \u2603 \x00", "a <eos> in <pad> text"]
    for document, ids in zip(documents, tokenizer.encode(documents), strict=True):
        assert ids[-1] == tokenizer.eos_id
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids[:-1])
        assert tokenizer.backend.decode(ids[:-1]) == document


def test_a_missing_gguf_file_is_named_with_its_field():
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"data\.tokenizer='none\.gguf' does not exist: name a folder, a \.gguf file"):
        load_tokenizer("none.gguf")


def test_a_text_in_place_of_a_list_is_refused():
    with pytest.raises(UserError, match=r"encode takes a list of texts: pass \[text\]"):
        train_bpe(TEXT, 300).encode("the fox")


def test_a_pad_beyond_the_vocabulary_is_replaced_by_an_unused_special_token():
    bpe = train_bpe(TEXT, 300)
    assert with_pad_below(bpe, 300) is bpe
    backend = Tokenizer.from_str(bpe.json)
    backend.add_special_tokens(["[added]"])
    tokenizer = with_pad_below(DocumentTokenizer(backend.to_str(), pad_id=300, eos_id=1), 300)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert 0 not in tokenizer.encode(["the <pad> fox"])[0]
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != 0]
    with pytest.raises(UserError, match=r"no special token to pad rows with .* below the 300"):
        with_pad_below(DocumentTokenizer(json.dumps(content), pad_id=300, eos_id=1), 300)


def test_a_pad_is_not_replaced_by_the_token_for_unknown_text(word_level, tmp_path):
    tokenizer = load_tokenizer(word_level(tmp_path, ["<s>", "</s>"]))
    assert tokenizer.backend.token_to_id("<unk>") == 2
    assert with_pad_below(tokenizer, tokenizer.pad_id).pad_id == 0


def test_bpe_trains_on_a_bounded_part(monkeypatch):
    monkeypatch.setattr(tokenizers_room, "BPE_CHARACTERS", 100)

    def endless():
        while True:
            yield "some words and some more words"

    assert train_bpe(endless(), 300).vocab_size < 300


def test_a_longer_word_than_4096_characters_is_trained_on_in_parts():
    longest = "x" * tokenizers_room.WORD_CHARACTERS
    assert train_bpe([2 * longest + "xxx"], 300) == train_bpe([longest, longest, "xxx"], 300)


def test_text_without_long_words_is_trained_on_unchanged():
    text = "Zeichen, 你好。" * 3000 + "a-b_1" * 900
    assert tokenizers_room._split_long_words(text) == text


def test_a_t5_like_folder_keeps_its_own_pad_and_ends_once(word_level, tmp_path):
    tokenizer = load_tokenizer(word_level(tmp_path, ["<pad>", "</s>"], {"eos_token": {"content": "</s>"}}))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    ids = tokenizer.encode(["the quick brown fox jumps"])[0]
    assert len(ids) == 6  # neither truncated nor padded as the file asks, and one EOS
    assert ids.count(1) == 1


def test_a_llama_like_folder_gets_a_pad(word_level, tmp_path):
    name = word_level(tmp_path, ["<s>", "</s>"], {"eos_token": "</s>", "pad_token": "</s>"})
    plain = Tokenizer.from_file(f"{name}/tokenizer.json").get_vocab_size()
    tokenizer = load_tokenizer(name)
    assert tokenizer.eos_id == 1
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (plain, plain + 1)
    assert load_tokenizer(name).sha256 == tokenizer.sha256


def test_eos_is_recognised_by_its_spelling_without_configuration(word_level, tmp_path):
    assert load_tokenizer(word_level(tmp_path, ["<|endoftext|>"])).eos_id == 0


def test_tokenizer_config_wins_over_the_map_of_special_tokens(word_level, tmp_path):
    name = word_level(tmp_path, ["<x>", "</s>"], {"eos_token": "</s>"})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<x>"}')
    assert load_tokenizer(name).eos_id == 1


def test_a_vocabulary_with_a_gap_has_the_size_of_its_largest_id():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 7}, "<unk>"))
    assert DocumentTokenizer(backend.to_str(), pad_id=0, eos_id=1).vocab_size == 8


def test_a_tokenizer_without_eos_is_refused(word_level, tmp_path):
    with pytest.raises(UserError, match="no end-of-sequence token: name one as eos_token"):
        load_tokenizer(word_level(tmp_path, ["<start>"]))


def test_another_format_is_converted(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode(["ab"]) == [[3, 0]]
    assert tokenizer.pad_id not in (0, 1, 2, 3)


def test_another_format_on_the_hub_is_converted(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    contents = {
        "vocab.json": '{"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}',
        "merges.txt": "#version: 0.2\na b\n",
        "config.json": '{"model_type": "gpt2"}',
    }

    def snapshot_download(name, allow_patterns, local_files_only=False):
        found = [] if local_files_only else list(contents)
        for file in huggingface_hub.utils.filter_repo_objects(found, allow_patterns=allow_patterns):
            (tmp_path / file).write_text(contents[file])
        return str(tmp_path)

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(tokenizers_room, "require_hub", lambda *setting: asked.append(setting))
    for _ in range(2):
        assert load_tokenizer("owner/name").encode(["ab"]) == [[3, 0]]
    assert len(asked) == 1  # then it is in the cache


WORDS = {"<unk>": 0, "</s>": 1, "a": 2}
BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}


@pytest.mark.parametrize(
    ("model", "pad"),
    [
        (models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False), "<pad>"),
        (models.WordLevel(WORDS, "<unk>"), "<pad>"),
        (models.BPE(WORDS, [], unk_token="<unk>"), "<pad>"),
        (models.BPE(WORDS, [], unk_token="<unk>", byte_fallback=True), "<pad>"),
        (models.BPE(WORDS | BYTES, [], unk_token="<unk>", byte_fallback=True), "<unk>"),
    ],
    ids=["Unigram", "WordLevel", "BPE", "BPE of some bytes", "BPE of all bytes"],
)
def test_a_token_for_unknown_text_is_no_pad(model, pad, tmp_path):
    backend = Tokenizer(model)
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<unk>"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.backend.id_to_token(tokenizer.pad_id) == pad
    assert tokenizer.pad_id not in tokenizer.encode(["zz"])[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "no such folder"), ("a/b/c", "no such folder"), ("no such name", "neither a folder nor a name")],
)
def test_an_impossible_name_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


def test_an_unreachable_hub_fails_immediately(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"data.tokenizer='google-t5/t5-base' needs the Hugging Face hub"):
        load_tokenizer("google-t5/t5-base")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_folder_without_a_vocabulary_is_one_line(tmp_path, file):
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value) == (
        f"data.tokenizer={str(tmp_path)!r}: no tokenizer: copy its tokenizer.json, or tokenizer.model, and "
        "tokenizer_config.json into the folder"
    )


def test_damaged_files_are_named(word_level, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(str(tmp_path))
    word_level(tmp_path, ["</s>"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: .*; it must hold a JSON object"):
        load_tokenizer(str(tmp_path))
