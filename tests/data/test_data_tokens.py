import numpy as np
import pytest
import torch

from lightsparse.data.tokens import ByteTokenizer, token_dtype

TEXTS = ["", "plain", "tabs\tand\r\nline ends\n", "naïve Σ 日本語 🙂", "\x00\x7f\ufeff\U0010ffff"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids.astype(np.int64))) == text


def test_special_tokens_never_occur_in_any_character():
    every_character = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    ids = ByteTokenizer().encode(every_character)
    assert not np.isin(ids, [ByteTokenizer.bos, ByteTokenizer.mask]).any()


def test_a_cut_character_or_special_token_decodes_to_the_replacement_character():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([tokenizer.bos, *"é".encode()[:1], ord("a")]) == "\ufffd\ufffda"


def test_token_bytes_of_a_document_sum_to_the_bytes_of_its_text():
    tokenizer = ByteTokenizer()
    ids = torch.tensor([tokenizer.bos, *tokenizer.encode("naïve"), tokenizer.mask])
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[ids].sum() == len("naïve".encode())


@pytest.mark.parametrize(
    "vocab_size, dtype", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_tokens_are_stored_as_narrow_as_the_vocabulary_allows(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1
