"""Small tokenizers of every kind there is on the hub, trained here: what each does to the beginning of a text, to
spaces and to what its vocabulary lacks is what real ones do."""

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lightsparse.data.subwords import SubwordTokenizer

LINES = (
    "The quick brown fox jumps over the lazy dog.\n",
    "What is the pass key? The pass key is 41873. Remember it.\n",
    "It's naïve, isn't it: 日本語 and  two spaces, x1 = y2 - 345;\n\n",
    "Here we go. There and back again, again and again. The grass is green. The sky is blue.\n",
)
CORPUS = "".join(LINES) * 8
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def _bpe(normalizer, words, decoder, alphabet=()):
    """A BPE that falls back to bytes; these are words like others, no special ones, as in Llama 2's file."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if words is not None:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoder
    special, size = SPECIAL + BYTES, 420 + len(alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] in SPECIAL]
    return content


def _llama_2(words):
    """SentencePiece's BPE as it is converted: a ▁ before the text, nothing that finds words in it."""
    return _bpe(SPACES, pre_tokenizers.Split("▁", "merged_with_next") if words else None, LLAMA_2) | {
        "pre_tokenizer": None
    }


def _metaspace(scheme, split=True):
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", scheme)])
    return _bpe(None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split), decoder)


def _byte_level(prefix_space):
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return _bpe(None, words, decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet())


def _unigram():
    """T5's: NFKC, runs of spaces as one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return json.loads(tokenizer.to_str())


def _word_piece():
    """BERT's: lower case, words without their spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return json.loads(tokenizer.to_str())


_MADE = {
    "llama 2": lambda: _llama_2(words=True),
    "llama 2 across spaces": lambda: _llama_2(words=False),
    "metaspace": lambda: _metaspace("always"),
    "metaspace at the beginning": lambda: _metaspace("first"),
    "metaspace without any": lambda: _metaspace("never"),
    "metaspace across spaces": lambda: _metaspace("always", split=False),
    "unigram": _unigram,
    "word piece": _word_piece,
    "byte level": lambda: _byte_level(prefix_space=False),
    "byte level after a space": lambda: _byte_level(prefix_space=True),
}
KINDS = tuple(_MADE)
LOSSLESS = ("llama 2", "llama 2 across spaces", "metaspace without any", "byte level")


@cache
def _content(kind):
    return json.dumps(_MADE[kind]())


def raw(kind):
    """As the package has it."""
    return Tokenizer.from_str(_content(kind))


def tokenizer_of_kind(kind):
    return SubwordTokenizer(raw(kind), name="hf", bos="<s>")
