"""Our byte tokenizer as one of transformers: the same ids, so that an exported model reads and writes text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, MASK = "<bos>", "<mask>"


def save_byte_tokenizer(folder: str | Path, *, bos: int, mask: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json: a BPE without merges over GPT-2's signs for the 256 bytes.

    The bytes `bos` and `mask`, which never occur in UTF-8, are the special tokens. A text gets the bos in front, as
    every document has in training, and bos is eos too: what a model writes after its document would be another one.
    """
    special = {bos: BOS, mask: MASK}
    vocabulary = {special.get(byte, sign): byte for sign, byte in _signs().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        mask_token=MASK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(str(folder))


def _signs() -> dict[str, int]:
    """GPT-2's printable sign for each byte → the byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
