"""Our tokenizers as files that transformers reads: the same ids from the beginning of a text on."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer as Package
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from lightsparse.data.subwords import TOKENIZER, SubwordTokenizer
from lightsparse.data.tokens import ByteTokenizer, Tokenizer
from lightsparse.models.text_stream import document_of
from lightsparse.utils.text import first_line

log = logging.getLogger(__name__)

BOS, MASK = "<bos>", "<mask>"  # as which the two bytes are written that never occur in UTF-8
# What tokenizers read differently: a letter in two characters, digits, spaces, signs of several bytes.
_PROBE = "The naive e\u0301 fox's\t12345\n\n  日本語 🙂"


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Writes tokenizer.json and tokenizer_config.json beside the config.json of a model.

    Returns the class of transformers whose from_pretrained reads them as our generation reads a text, None for a
    tokenizer without text. Of a Qwen2 AutoTokenizer takes the vocabulary alone, and finds words by rules of its own.
    """
    if isinstance(tokenizer, ByteTokenizer):
        SubwordTokenizer(_bytes(), name="bytes", bos=BOS, mask=MASK).save(folder)
    elif isinstance(tokenizer, SubwordTokenizer):
        tokenizer.save(folder)
    else:
        return None
    try:
        ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(_PROBE)["input_ids"]
    except Exception as error:  # from rules that do not suit the vocabulary
        log.info("AutoTokenizer cannot read %s: %s", folder / TOKENIZER, first_line(error))
        ids = None
    return "AutoTokenizer" if ids == document_of(tokenizer, _PROBE) else "PreTrainedTokenizerFast"


def _bytes() -> Package:
    """A BPE without merges over GPT-2's signs for the 256 bytes."""
    special = {ByteTokenizer.bos: BOS, ByteTokenizer.mask: MASK}
    vocabulary = {special.get(byte, sign): byte for sign, byte in _signs().items()}
    tokenizer = Package(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _signs() -> dict[str, int]:
    """GPT-2's printable sign for each byte → the byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
