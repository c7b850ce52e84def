"""Subwords: any tokenizer of the Hugging Face package `tokenizers` as a Tokenizer, and training a byte-level BPE.

On disk one is two files, as in any model's folder: tokenizer.json, and tokenizer_config.json with the names of its
special tokens. The package is imported on first use: bytes, the default, do without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightsparse.data.errors import DataError
from lightsparse.data.text_chunks import Chunk, chunks, cut
from lightsparse.data.tokens import token_dtype
from lightsparse.utils.atomic_files import write_text
from lightsparse.utils.text import first_line

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)

BOS, MASK = "<|bos|>", "<|mask|>"  # of tokenizers that have none
TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
_OTHERS = ("\n", ".", "a")  # what may stand before a part of a text, where what does cannot be used
_BYTE = "<0x[0-9A-Fa-f]{2}>"
SMALLEST = 258  # ids: 256 bytes and the two special tokens


class SubwordTokenizer:
    """A `tokenizers.Tokenizer` whose special tokens are never found in a text.

    name        of the kind, for the fingerprint
    bos, mask   contents of the special tokens; put after the vocabulary's end where they are not in it. bos None: it
                gets one of ours; mask None: it has none
    vocab_size  at least so many ids, those past the end unused: a model's size is fixed before its BPE is trained
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        name: str,
        bos: str | None = None,
        mask: str | None = None,
        vocab_size: int = 0,
    ):
        self._tokenizer, self.name = tokenizer, name
        package = _package()
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # special tokens in a text are text
        self._mask = mask
        self._specials = [bos or BOS, *([mask] if mask is not None else [])]
        special = [package.AddedToken(each, special=True, normalized=False) for each in self._specials]
        tokenizer.add_special_tokens(special)
        self._vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.bos = self._vocabulary[self._specials[0]]
        self.mask = None if mask is None else self._vocabulary[mask]
        # What others add to a text is what opens a document here. One of the model's own may move offsets, too.
        tokenizer.post_processor = package.processors.TemplateProcessing(
            single=[self._specials[0], "$A"], special_tokens=[(self._specials[0], self.bos)]
        )
        self._special_ids = [self._vocabulary[each] for each in self._specials]
        self.vocab_size = max(vocab_size, 1 + max(self._vocabulary.values()))

    @cached_property
    def fingerprint(self) -> str:
        """Over the whole of tokenizer.json."""
        content = f"{self._tokenizer.to_str()}{self.bos} {self.mask} {self.vocab_size}"
        return f"{self.name}-{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        return self._joined(self.encode_chunks(list(chunks(cut([text]), self.border))))

    def encode_parts(self, parts: Sequence[str]) -> list[np.ndarray]:
        text, borders = "".join(parts), np.cumsum([len(part) for part in parts])[:-1]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ends = np.maximum.accumulate(np.array([0, *(end for _, end in encoding.offsets)]))[1:]
        ids = np.array(encoding.ids, dtype=token_dtype(self.vocab_size))
        if np.isin(ids, self._special_ids).any():
            ids = self.encode(text)
            heads = (self.encode(text[:border]) for border in borders)
            return np.split(ids, [_common(head, ids) for head in heads])
        return np.split(ids, np.searchsorted(ends, borders, side="right"))

    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """In parallel over the chunks, on as many threads as RAYON_NUM_THREADS says (default: all)."""
        encoded = self._ids([text for before, own in chunks for text in (before, before + own)])
        found = []
        for (before, own), head, ids in zip(chunks, encoded[::2], encoded[1::2], strict=True):
            ids = ids[len(head) :] if _begins(ids, head) else self._following(own, _OTHERS)
            if np.isin(ids, self._special_ids).any():  # a vocabulary that lists them among its words (Unigram)
                ids = self._apart(before, own)
            found.append(ids)
        return found

    def border(self, left: str, right: str) -> int:
        text = left + right
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        # Between two tokens may be accents that belong to the first, and spaces that belong to the second.
        places = (
            next((place for place in range(end, start) if text[place].isspace()), start)
            for (_, end), (start, _) in pairwise(offsets)
            if end <= start
        )
        return min((place - len(left) for place in places), key=abs, default=0)

    def _following(self, text: str, befores: Sequence[str]) -> np.ndarray:
        """Ids of a text behind the first of `befores` whose tokens do not reach into it, or else by itself."""
        for before in befores:
            head, ids = self._ids([before, before + text])
            if _begins(ids, head):
                return ids[len(head) :]
        return self._ids([text])[0]

    def _apart(self, before: str, text: str) -> np.ndarray:
        """The text cut inside every special token's name that is written in it."""
        inside = "|".join(f"(?<={re.escape(name[:1])})(?={re.escape(name[1:])})" for name in self._specials)
        first, *others = (part for part in re.split(inside, text) if part)
        befores = [before, *_OTHERS] if before else [""]
        ids = self._joined([self._following(first, befores), *(self._following(part, _OTHERS) for part in others)])
        if np.isin(ids, self._special_ids).any():
            raise DataError(
                f"the tokenizer {self.name} reads its special token {' or '.join(self._specials)} in ordinary text, "
                "which would end documents where there is no end; use another, such as tokenizer=bpe"
            )
        return ids

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=token_dtype(self.vocab_size)) for encoding in encodings]

    def _joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty(0, token_dtype(self.vocab_size)), *parts])

    def decode(self, ids: Tensor | np.ndarray | Sequence[int]) -> str:
        """Special and unused ids are left out."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def token_bytes(self) -> Tensor:
        """Exact for byte-level tokenizers. For others what a token shows: ▁ is a space, ## nothing, <0x0A> one byte;
        a text changed before it was encoded (lower case, say) has another length."""
        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        byte_level = self.is_byte_level
        for token, id in self._vocabulary.items():
            lengths[id] = len(token) if byte_level else _shown_bytes(token)
        for id, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[id] = 0 if added.special else len(added.content.encode())
        return lengths

    @cached_property
    def _decoder(self) -> str:
        return json.dumps(json.loads(self._tokenizer.to_str())["decoder"])

    @property
    def is_byte_level(self) -> bool:
        """Whether each character of a token's name stands for one byte."""
        return '"ByteLevel"' in self._decoder

    @cached_property
    def unsettled(self) -> frozenset[int]:
        """Single bytes, <0x41>: a run of them is decoded as a whole, and as U+FFFD where any of it is not UTF-8."""
        names = self._vocabulary if '"ByteFallback"' in self._decoder else {}
        return frozenset(id for token, id in names.items() if re.fullmatch(_BYTE, token))

    def save(self, folder: Path) -> None:
        """tokenizer.json and, before it, tokenizer_config.json; transformers reads them, too, and begins each text with
        the bos. It is eos as well: what a model writes after its document would be another one."""
        config = dict.fromkeys(("bos_token", "eos_token", "pad_token"), self._specials[0]) | {
            "mask_token": self._mask,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        write_text(folder / TOKENIZER, self._tokenizer.to_str(pretty=True) + "\n")


def load_subwords(file: Path, config: Path | None, vocab_size: int | None = None) -> SubwordTokenizer:
    """The tokenizer of a tokenizer.json and, if there is one, its tokenizer_config.json.

    bos is the model's bos_token, else its eos_token (GPT-2's <|endoftext|>), else appended; mask the model's, if any.
    vocab_size  ids that its model has rows for, where those are more than its own
    Raises DataError where a file cannot be read as that.
    """
    package = _package()
    try:
        tokenizer = package.Tokenizer.from_file(str(file))
        settings: dict[str, Any] = dict(json.loads(config.read_bytes())) if config is not None else {}
    except Exception as error:  # the package raises a bare Exception for whatever it cannot parse
        raise DataError(f"{file} cannot be read as a tokenizer: {first_line(error)}") from error
    own = settings.get("name") if isinstance(settings.get("name"), str) else None
    loaded = SubwordTokenizer(
        tokenizer,
        name=own or "hf",
        bos=_content(settings.get("bos_token")) or _content(settings.get("eos_token")),
        mask=_content(settings.get("mask_token")),
        vocab_size=vocab_size or settings.get("vocab_size") or 0,
    )
    if vocab_size is not None and vocab_size < loaded.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size is {vocab_size}, and {file} has {loaded.vocab_size} ids; give at least that"
        )
    if not loaded.is_byte_level:
        log.info("tokenizer: %s is not byte-level, so bits per byte are what its tokens show, not exact", file)
    return loaded


def train_bpe(pieces: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """A byte-level BPE with GPT-2's words (Radford et al. 2019) from the pieces of a text.

    Deterministic. Ids: bos 0, mask 1, the 256 bytes, then merges; a small text may have too few of them, and the ids
    past the last are never used.
    """
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, MASK],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    found = tokenizer.get_vocab_size()
    log.info("tokenizer: trained a BPE of %d ids%s", found, "" if found == vocab_size else f", {vocab_size} asked for")
    return SubwordTokenizer(tokenizer, name="bpe", bos=BOS, mask=MASK, vocab_size=vocab_size)


def _package() -> Any:
    # Said explicitly, or a loader that forks after an encoding warns on stderr; its processes never encode.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise DataError(
            "this tokenizer needs the package tokenizers, which is not installed; pip install 'lightsparse[hf]', or "
            "use tokenizer=bytes"
        ) from error
    return tokenizers


def _begins(ids: np.ndarray, head: np.ndarray) -> bool:
    return np.array_equal(ids[: len(head)], head)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Ids with which both begin."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _content(token: object) -> str | None:
    """A special token's text, written as text or as {"content": text, …}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _shown_bytes(token: str) -> int:
    if re.fullmatch(_BYTE, token):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())
