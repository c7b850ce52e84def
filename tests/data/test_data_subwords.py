"""Subword tokenizers: lossless, blind to special tokens in a text, byte counts exact, the same in pieces as at once."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lightsparse.data.errors import DataError
from lightsparse.data.subwords import BOS, MASK, SubwordTokenizer, load_subwords, train_bpe
from lightsparse.data.text_chunks import cut
from lightsparse.data.tokenizer import BPE, HuggingFace, load_folder

TEXTS = [
    "The quick brown fox\n\n  jumps\tover 12345 lazy dogs; it's über-naïve, 日本語 and 🙂🙂!\r\n",
    "def f(x):\n    return x ** 2  # two spaces\n\n\nclass A:\n\tpass\n",
    f"text about {BOS} and {MASK}, <s>, </s> and [MASK] is text\x00\x1c \u3000",
]
CORPUS = "".join(TEXTS) * 20
# The words of GPT-4's tokenizer (tiktoken's cl100k_base), as another pre-tokenizer that the cuts must suit.
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([CORPUS], 400)


def random_text(length, seed=0):
    """Words, runs of all kinds of white space, punctuation, digits and letters of several scripts."""
    rng = random.Random(seed)
    words = [
        "a",
        "the",
        "naïve",
        "日本",
        "🙂",
        "x1",
        "42",
        "--",
        "it's",
        ".",
        "\n",
        "\r\n",
        "  ",
        "\t",
        " ",
        "\u00a0",
        "\x1c",
    ]
    return "".join(rng.choice(words) + rng.choice(["", " ", " ", "  "]) for _ in range(length))


@pytest.mark.parametrize("text", [*TEXTS, CORPUS, "", " ", "\n"])
def test_decoding_gives_the_text_back_and_tokens_count_its_bytes(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.uint16 and bpe.decode(ids) == text
    assert bpe.token_bytes()[torch.from_numpy(ids.astype(np.int64))].sum() == len(text.encode())


def test_every_id_counts_the_bytes_it_stands_for(bpe):
    lengths = bpe.token_bytes()
    assert lengths.shape == (bpe.vocab_size,) and lengths[[bpe.bos, bpe.mask]].tolist() == [0, 0]
    raw = Tokenizer.from_str(bpe._tokenizer.to_str())
    alphabet = {character: byte for byte, character in _byte_alphabet().items()}
    for id in range(2, raw.get_vocab_size()):
        assert lengths[id] == len(bytes(alphabet[character] for character in raw.id_to_token(id)))


def _byte_alphabet():
    """Byte → character of GPT-2's byte-level names, from its definition."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def test_special_tokens_written_in_a_text_are_text(bpe):
    ids = bpe.encode(TEXTS[2])
    assert not np.isin(ids, [bpe.bos, bpe.mask]).any()


def test_special_and_unused_ids_decode_to_nothing(bpe):
    assert bpe.decode([bpe.bos, *bpe.encode("word"), bpe.mask, bpe.vocab_size - 1 + 100]) == "word"


@pytest.mark.parametrize("parts", [1, 7, 64, 1000], ids=lambda parts: f"read {parts} at once")
def test_where_a_text_is_cut_does_not_depend_on_how_it_was_read(parts):
    text = random_text(3000)
    whole = list(cut([text], piece=50))
    assert whole == list(cut((text[i : i + parts] for i in range(0, len(text), parts)), piece=50))
    assert "".join(whole) == text and all(50 <= len(piece) <= 100 for piece in whole[:-1])


@pytest.mark.parametrize("words", ["gpt2", "gpt4"])
@pytest.mark.parametrize("piece", [40, 55, 100, 1000])
def test_pieces_have_the_tokens_of_the_whole(bpe, piece, words):
    text = random_text(2000, seed=piece)
    tokenizer = Tokenizer.from_str(bpe._tokenizer.to_str())
    if words == "gpt4":
        splits = pre_tokenizers.Split(Regex(GPT4_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    pieces = list(cut([text], piece=piece))
    assert len(pieces) > 3 and not any(len(each) == 2 * piece for each in pieces)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [id for each in pieces for id in tokenizer.encode(each, add_special_tokens=False).ids] == whole


def test_a_text_without_spaces_is_cut_all_the_same(bpe):
    text = "日本語" * 60_000
    assert max(map(len, cut([text]))) == 1 << 16
    assert bpe.decode(bpe.encode(text)) == text


def test_training_is_the_same_in_every_process(bpe):
    code = f"from lightsparse.data.subwords import train_bpe as t; print(t([{CORPUS!r}], 400).fingerprint)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == bpe.fingerprint


def test_a_small_text_leaves_ids_unused_but_the_size_as_asked(caplog):
    caplog.set_level("INFO", logger="lightsparse.data")
    tokenizer = train_bpe(["abc " * 50], 1000)
    assert tokenizer.vocab_size == 1000 == len(tokenizer.token_bytes())
    assert "of 261 ids, 1000 asked for" in caplog.text


def test_a_saved_tokenizer_is_the_same_when_loaded(bpe, tmp_path):
    bpe.save(tmp_path)
    loaded = load_folder(tmp_path)
    assert (loaded.fingerprint, loaded.vocab_size, loaded.bos, loaded.mask) == (
        bpe.fingerprint, bpe.vocab_size, bpe.bos, bpe.mask,
    )  # fmt: skip
    assert np.array_equal(loaded.encode(CORPUS), bpe.encode(CORPUS))
    assert HuggingFace(path=str(tmp_path)).build(lambda _: iter(())).fingerprint == bpe.fingerprint


def test_another_text_or_size_is_another_fingerprint(bpe):
    assert len({bpe.fingerprint, train_bpe([CORPUS], 401).fingerprint, train_bpe([CORPUS[:500]], 400).fingerprint}) == 3


def test_transformers_reads_what_is_saved(bpe, tmp_path):
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[0], add_special_tokens=False)["input_ids"] == bpe.encode(TEXTS[0]).tolist()
    assert (loaded.bos_token_id, loaded.mask_token_id) == (bpe.bos, bpe.mask)


def model_folder(path, settings):
    """A GPT-2-like tokenizer.json with <|endoftext|> as its last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.add_tokens([AddedToken("    ")])
    tokenizer.save(str(path / "tokenizer.json"))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.mark.parametrize(
    "settings, bos, mask",
    [
        ({"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}}, 300, None),
        ({"eos_token": "<|endoftext|>", "bos_token": None}, 300, None),
        ({"mask_token": "<|endoftext|>"}, 302, 300),
        ({}, 302, None),
        (None, 302, None),
    ],
)
def test_a_model_s_special_tokens_are_used_and_a_missing_bos_is_put_after_its_vocabulary(tmp_path, settings, bos, mask):
    model_folder(tmp_path, settings)
    tokenizer = HuggingFace(path=str(tmp_path)).build(lambda _: iter(()))
    assert (tokenizer.bos, tokenizer.mask) == (bos, mask)
    assert tokenizer.vocab_size == HuggingFace(path=str(tmp_path)).size() == 1 + max(301, bos, mask or 0)
    more = HuggingFace(path=str(tmp_path), vocab_size=500)
    assert more.size() == 500 and more.identity() != HuggingFace(path=str(tmp_path)).identity()
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size is 30"):
        HuggingFace(path=str(tmp_path), vocab_size=30).size()
    text = "x<|endoftext|>y    z <|bos|>"
    ids = tokenizer.encode(text)
    assert 300 not in ids and 301 in ids and tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[torch.from_numpy(ids.astype(np.int64))].sum() == len(text)


def test_a_unigram_whose_words_hold_its_special_token_does_not_find_it_in_text():
    words = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁ab</s>"), ("▁a", -1.0)]
    raw = Tokenizer(models.Unigram(words, unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    assert 1 in raw.encode("a</s>b").ids
    tokenizer = SubwordTokenizer(raw, name="hf", bos="</s>")
    assert tokenizer.bos == 1 and 1 not in tokenizer.encode("a</s>b </s>")
    assert not tokenizer.is_byte_level
    assert tokenizer.token_bytes()[raw.token_to_id("▁a")] == 2  # a space and a letter


def test_a_file_that_is_no_tokenizer_is_named_in_one_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read as a tokenizer: [^\n]+$"):
        load_subwords(tmp_path / "tokenizer.json", None)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"7"])
def test_settings_that_are_damaged_are_one_sentence(bpe, tmp_path, content):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as a tokenizer: [^\n]+$"):
        load_folder(tmp_path)


def test_a_tokenizer_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)[^\n]+$"):
        load_folder(tmp_path)


def test_a_hub_that_cannot_be_reached_is_answered_with_what_works():
    with pytest.raises(DataError, match=r"tokenizer.path is 'some/model', [^\n]*tokenizer=bytes, tokenizer=bpe and"):
        HuggingFace(path="some/model").size()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'lightsparse\[hf\]'"):
        train_bpe(["text"], 300)


@pytest.mark.parametrize(
    "kind, fields, sentence",
    [
        (BPE, {"vocab_size": 257}, "tokenizer.vocab_size is 257; it counts ids and must be at least 258"),
        (BPE, {"train_characters": 0}, "tokenizer.train_characters is 0"),
        (HuggingFace, {}, "tokenizer.path is empty"),
        (HuggingFace, {"path": "."}, "tokenizer.path is '.', a folder without tokenizer.json"),
        (HuggingFace, {"path": "pyproject.toml", "revision": "v1"}, "tokenizer.revision is 'v1'"),
    ],
)
def test_a_wrong_field_is_refused_by_name(kind, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**fields)
