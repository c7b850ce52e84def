from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from lightsparse.data.corpus import Corpus, select
from lightsparse.data.documents import Document, divided, hash_share
from lightsparse.data.encoding import encode_in_memory
from lightsparse.data.source import DataError
from lightsparse.data.text import TextConfig
from lightsparse.data.tokens import ByteTokenizer

TOKENIZER = ByteTokenizer()


@dataclass(frozen=True, kw_only=True)
class ListedData(TextConfig):
    listed: tuple[Document, ...]
    context: int = 8
    val_fraction: float = 0.3

    def documents(self) -> Iterator[Document]:
        yield from self.listed


def corpus_of(config: TextConfig) -> Corpus:
    documents = divided(config.documents_after, config.val_fraction)(0)
    tokens, entries, empty = encode_in_memory(documents, TOKENIZER)
    return select(tokens, entries, config.selection, context=config.context, empty=empty)


def numbered(count, length=20):
    return tuple(Document(f"doc{i}", f"{i:04}" * (length // 4)) for i in range(count))


def texts(stream):
    """The documents of a stream, found by their bos."""
    assert stream[:1] == [TOKENIZER.bos]
    return [part.decode() for part in stream[:].tobytes().split(bytes([TOKENIZER.bos]))[1:]]


def test_every_document_is_in_exactly_one_split_in_hash_order():
    corpus = corpus_of(ListedData(listed=numbered(200)))
    by_hash = sorted(numbered(200), key=lambda document: hash_share(document.name))
    held_out = texts(corpus.val)
    assert held_out + texts(corpus.train) == [document.text for document in by_hash]
    assert len(held_out) / 200 == pytest.approx(0.3, abs=0.1)
    assert corpus.train[:].dtype == corpus.val[:].dtype == np.uint8


def test_more_documents_never_move_the_others():
    few, many = (corpus_of(ListedData(listed=numbered(count))) for count in (50, 200))
    assert set(texts(few.val)) < set(texts(many.val))
    assert set(texts(few.train)) < set(texts(many.train))


def test_the_order_of_the_source_changes_nothing():
    listed = numbered(50)
    one, other = (corpus_of(ListedData(listed=docs)) for docs in (listed, listed[::-1]))
    assert np.array_equal(one.train[:], other.train[:]) and np.array_equal(one.val[:], other.val[:])
    assert one.manifest == other.manifest


@pytest.mark.parametrize("change", ["text", "name", "fewer", "split"])
def test_any_change_of_the_documents_changes_the_manifest(change):
    listed = numbered(50)
    changed = {
        "text": (*listed[:-1], Document("doc49", "0049" * 4 + "0048")),
        "name": (*listed[:-1], Document("doc49b", listed[-1].text)),
        "fewer": listed[:-1],
        "split": listed,
    }[change]
    other = ListedData(listed=changed, val_fraction=0.5 if change == "split" else 0.3)
    assert corpus_of(ListedData(listed=listed)).manifest != corpus_of(other).manifest


def test_a_source_that_names_its_validation_documents_is_obeyed():
    listed = tuple(Document(d.name, d.text, validation=i < 2) for i, d in enumerate(numbered(20)))
    corpus = corpus_of(ListedData(listed=listed))
    assert set(texts(corpus.val)) == {listed[0].text, listed[1].text}
    assert len(texts(corpus.train)) == 18


def test_empty_documents_are_left_out_and_counted(caplog):
    caplog.set_level("INFO", logger="lightsparse.data")
    with_empty = (*numbered(50), Document("nothing", ""), Document("nil", ""))
    corpus = corpus_of(ListedData(listed=with_empty))
    assert corpus.manifest == corpus_of(ListedData(listed=numbered(50))).manifest
    assert "2 empty ones left out" in caplog.text


def test_too_little_to_train_on_is_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"training has 0 tokens in 0 documents, .*data.context \+ 1 = 9;"):
        corpus_of(ListedData(listed=()))
    exactly = (Document("a", "x" * 8, False), Document("b", "y" * 8, True))
    assert len(corpus_of(ListedData(listed=exactly)).train) == 9
    with pytest.raises(DataError, match=r"training has 9 tokens in 1 documents, .*data.context \+ 1 = 10;"):
        corpus_of(ListedData(listed=exactly, context=9))


def test_too_little_held_out_is_answered_with_a_fraction_that_works():
    listed = numbered(10)
    with pytest.raises(
        DataError, match=r"validation has 0 tokens in 0 documents.*use data.val_fraction=0\.\d+$"
    ) as refusal:
        corpus_of(ListedData(listed=listed, val_fraction=0.001, context=30))
    fraction = float(str(refusal.value).rpartition("=")[2])
    corpus = corpus_of(ListedData(listed=listed, val_fraction=fraction, context=30))
    assert len(texts(corpus.val)) >= 2


@pytest.mark.parametrize(
    "listed",
    [
        (Document("one document", "x" * 20),),
        (Document("a", "x" * 100, False), Document("b", "y", True)),
    ],
)
def test_no_fraction_is_named_where_none_would_help(listed):
    with pytest.raises(DataError, match=r"lower data.context or give more documents"):
        corpus_of(ListedData(listed=listed))
