"""Pieces of a document and parts of a text have the tokens of the whole, whatever the tokenizer does at a beginning."""

import random
from itertools import pairwise

import numpy as np
import pytest
from tokenizer_kinds import KINDS, LINES, LOSSLESS, raw, tokenizer_of_kind
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from lightsparse.data import encoding, text_chunks
from lightsparse.data.documents import Document
from lightsparse.data.encoding import encode_in_memory
from lightsparse.data.subwords import SubwordTokenizer
from lightsparse.data.tokens import ByteTokenizer

ODD = ["日本語", "日本" * 9, "12345678", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "x" * 30, "\u00a0", "</", "a<b"]


def random_text(count, seed):
    draw, words = random.Random(seed), [word for line in LINES for word in line.split(" ")] + ODD
    return "".join(draw.choice(words) + draw.choice([" ", " ", "", " ", "  "]) for _ in range(count))


def ids_of(kind, text):
    """Of the package itself."""
    return raw(kind).encode(text, add_special_tokens=False).ids


@pytest.fixture(params=[40, 200, 900])
def piece(request, monkeypatch):
    """Characters of a piece."""
    monkeypatch.setattr(encoding, "cut", lambda parts: text_chunks.cut(parts, piece=request.param))
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(kind, piece):
    texts = [random_text(count, seed) for seed, count in enumerate((1500, 3, 900, 1500))]
    tokenizer = tokenizer_of_kind(kind)
    tokens, entries, _ = encode_in_memory([Document(f"{i}", text) for i, text in enumerate(texts)], tokenizer)
    for entry, text in zip(entries, texts, strict=True):
        found = tokens[entry["start"] : entry["start"] + entry["tokens"]].tolist()
        assert found == [tokenizer.bos, *ids_of(kind, text)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_without_spaces_has_the_tokens_of_the_whole(kind, monkeypatch):
    text = "日本語です。" * 40 + "naïve" * 30 + "41873-" * 50
    monkeypatch.setattr(encoding, "cut", lambda parts: text_chunks.cut(parts, piece=100))
    tokens, _, _ = encode_in_memory([Document("a", text)], tokenizer_of_kind(kind))
    assert tokens.tolist()[1:] == ids_of(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_is_that_of_the_package_beyond_the_length_of_a_piece(kind):
    text = random_text(14_000, seed=5)
    assert len(text) > 1 << 16
    assert tokenizer_of_kind(kind).encode(text).tolist() == ids_of(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_tokens_of_the_whole_each_those_that_end_in_it(kind):
    tokenizer = tokenizer_of_kind(kind)
    for seed in range(20):
        text, draw = random_text(40, seed), random.Random(seed)
        cuts = sorted([0, 0, len(text), *draw.sample(range(len(text)), 5)])  # some parts are empty
        parts = [text[start:stop] for start, stop in pairwise(cuts)]
        found = tokenizer.encode_parts(parts)
        assert np.concatenate(found).tolist() == ids_of(kind, text) and len(found) == len(parts)
        if kind in LOSSLESS and not seed % 4:
            before = tokenizer.decode(np.concatenate(found[:-2]))
            assert text.startswith(before.removesuffix("\ufffd")) and len(before) <= cuts[-3]


def test_digits_without_an_end_lose_none_where_their_groups_depend_on_the_beginning(monkeypatch):
    """Groups of three from the first digit on: no place tells where one begins, and still each digit is there once."""
    monkeypatch.setattr(encoding, "cut", lambda parts: text_chunks.cut(parts, piece=250))
    tokenizer = raw("byte level")
    groups = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([groups, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.add_tokens([f"{number}" for number in range(100, 1000, 7)])
    wrapped = SubwordTokenizer(tokenizer, name="hf", bos="<s>")
    text = "".join(map(str, range(1000, 2000)))
    tokens, _, _ = encode_in_memory([Document("digits", text)], wrapped)
    assert wrapped.decode(tokens) == text


def test_the_name_of_the_special_token_in_a_text_is_text_and_adds_no_space():
    words = [("<unk>", 0.0), ("</s>", 0.0), *((character, -3.0) for character in "▁ab</s>"), ("▁a", -1.0)]
    plain = Tokenizer(models.Unigram(words, unk_id=0))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = SubwordTokenizer(plain, name="hf", bos="</s>")
    for text in ("a</s>b </s>", "</s></s>a", "a a</s>"):
        ids = tokenizer.encode(text)
        assert tokenizer.bos not in ids and tokenizer.decode(ids) == text
        parts = tokenizer.encode_parts([text[:3], text[3:]])
        assert np.concatenate(parts).tolist() == ids.tolist()


def test_bytes_are_the_same_wherever_they_are_cut():
    text = random_text(50, 0)
    assert np.concatenate(ByteTokenizer().encode_parts([text[:20], "", text[20:]])).tolist() == list(text.encode())
