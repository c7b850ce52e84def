"""Prepared shards: the very tokens and samples of the text, whatever was killed on the way, in constant memory."""

import json
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch

from lightsparse.data import encoding, text_chunks
from lightsparse.data.documents import Document, TextFile
from lightsparse.data.encoding import encode_in_memory
from lightsparse.data.errors import DataError
from lightsparse.data.files import FilesData
from lightsparse.data.prepare import prepare
from lightsparse.data.prepared import PreparedData
from lightsparse.data.shards import ShardedTokens, complete_shards, read_manifest, write_shards
from lightsparse.data.subwords import train_bpe
from lightsparse.data.tokenizer import BPE
from lightsparse.data.tokens import ByteTokenizer

WORDS = ["sparse", "attention", "läuft", "日本", "🙂", "in", "blocks", "of", "64", "\n", "  ", "x=1;"]


def words(count, seed):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces and batches of a few characters, so that small texts are cut often."""
    monkeypatch.setattr(encoding, "cut", lambda parts: text_chunks.cut(parts, piece=60))
    monkeypatch.setattr(encoding, "BATCH", 150)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([words(3000, seed=99)], 300)


@pytest.fixture
def listed():
    """Documents of many lengths: empty ones, one longer than several shards, one at the end without text."""
    lengths = [5, 0, 40, 900, 1, 0, 13, 200, 7, 0]
    return [Document(f"doc{i}", words(length, i) if length else "") for i, length in enumerate(lengths)]


def source(documents):
    return lambda skip: iter(documents[skip:])


def content(folder):
    """Every file but the manifest of tokenizers and locks."""
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.startswith(("shard", "mani"))
    }


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shard_tokens", [1, 100, 333, 10**9])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_shards_hold_the_tokens_and_entries_of_one_pass_in_memory(tmp_path, listed, bpe, kind, shard_tokens):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    tokens, entries, empty = encode_in_memory(listed, tokenizer)
    write_shards(source(listed), tokenizer, tmp_path, shard_tokens=shard_tokens)
    manifest = read_manifest(tmp_path)
    manifest.verify()
    stored = ShardedTokens(manifest)
    assert np.array_equal(stored[:], tokens) and stored.dtype == tokens.dtype
    assert np.array_equal(manifest.entries(), entries)
    assert (manifest.documents, manifest.empty_documents) == (len(entries), empty) == (7, 3)
    assert manifest.text_bytes == sum(len(document.text.encode()) for document in listed)
    for start, stop in [(0, 1), (90, 110), (0, len(tokens)), (len(tokens) - 3, len(tokens)), (5, 5)]:
        assert np.array_equal(stored[start:stop], tokens[start:stop])


def test_the_tokens_of_a_document_are_those_of_its_whole_text(bpe, listed):
    tokens, entries, _ = encode_in_memory(listed, bpe)
    texts = [document.text for document in listed if document.text]
    for entry, text in zip(entries, texts, strict=True):
        span = tokens[entry["start"] : entry["start"] + entry["tokens"]]
        assert span[0] == bpe.bos and np.array_equal(
            span[1:], bpe._tokenizer.encode(text, add_special_tokens=False).ids
        )


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("step", range(1, 40, 3))
def test_killed_after_any_piece_and_continued_is_one_pass(tmp_path, listed, bpe, kind, step):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    (tmp_path / "one").mkdir(), (tmp_path / "killed").mkdir()
    write_shards(source(listed), tokenizer, tmp_path / "one", shard_tokens=300)

    def killing(*_):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    kills = 0
    while True:
        left = step
        try:
            write_shards(source(listed), tokenizer, tmp_path / "killed", shard_tokens=300, report=killing)
        except Killed:
            kills += 1
            if kills == 3:  # a shard may take more pieces than this: it would never get on
                step += 50
            continue
        break
    assert content(tmp_path / "killed") == content(tmp_path / "one")


def test_killed_before_any_file_takes_its_name_and_continued_is_one_pass(tmp_path, listed, monkeypatch):
    (tmp_path / "one").mkdir(), (tmp_path / "killed").mkdir()
    write_shards(source(listed), ByteTokenizer(), tmp_path / "one", shard_tokens=300)
    names = []
    rng, real = random.Random(0), os.fsync

    def killing(descriptor):
        names.append(descriptor)
        if rng.random() < 0.2:  # tokens, entries, record, folder: each comes to be the one that is lost
            raise Killed
        real(descriptor)

    monkeypatch.setattr(os, "fsync", killing)
    for _ in range(200):
        try:
            write_shards(source(listed), ByteTokenizer(), tmp_path / "killed", shard_tokens=300)
            break
        except Killed:
            pass
    monkeypatch.undo()
    assert len(names) > 20 and content(tmp_path / "killed") == content(tmp_path / "one")


def test_what_a_complete_shard_holds_is_never_encoded_again(tmp_path, listed):
    encoded = []

    class Counting(ByteTokenizer):
        def encode_chunks(self, given):
            encoded.extend(chunk.text for chunk in given)
            return super().encode_chunks(given)

    write_shards(source(listed), Counting(), tmp_path, shard_tokens=300)
    found = complete_shards(tmp_path)
    for shard in found[2:]:
        (tmp_path / f"{shard.name}.json").unlink()
    (tmp_path / "manifest.json").unlink()
    encoded.clear()
    write_shards(source(listed), Counting(), tmp_path, shard_tokens=300)
    rest = sum(shard.text_bytes for shard in found[2:])
    assert sum(len(text.encode()) for text in encoded) == rest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(words(20 + 9 * i, i), encoding="utf-8")
    return tmp_path / "texts"


def same_samples(one, other):
    for a, b in ((one.train, other.train), (one.val, other.val)):
        assert len(a) == len(b) > 0
        for i in range(len(a)):
            assert all(torch.equal(a[i][key], b[i][key]) for key in a[i])


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("fields", [{}, {"pack": "concat"}, {"min_tokens": 300, "max_tokens": 900}], ids=str)
def test_prepared_data_gives_the_very_samples_of_its_source(tmp_path, folder, tokenizer, fields):
    common = {"context": 65, "val_fraction": 0.3, **fields}
    data = FilesData(path=str(folder), **common)
    if tokenizer == "bpe":
        data = data.choose_tokenizer(BPE(vocab_size=300))
    prepare(data, tmp_path / "out", shard_tokens=2000)
    prepared = PreparedData(path=str(tmp_path / "out"), **common)
    one, other = data.samples(0, 500), prepared.samples(0, 500)
    same_samples(one, other)
    assert (one.manifest, one.train_tokens) == (other.manifest, other.train_tokens)
    assert prepared.vocab_size == data.vocab_size == other.tokenizer.vocab_size
    assert other.tokenizer.fingerprint == one.tokenizer.fingerprint


def test_a_cache_gives_the_same_samples_and_is_written_once(tmp_path, folder):
    plain = FilesData(path=str(folder), context=65, val_fraction=0.3)
    cached = FilesData(path=str(folder), context=65, val_fraction=0.3, cache=str(tmp_path / "cache"))
    same_samples(plain.samples(0, 500), cached.samples(0, 500))
    (written,) = (tmp_path / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in written.iterdir() if path.name.startswith("shard")}
    assert cached.samples(0, 500).manifest == plain.samples(0, 500).manifest
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (folder / "00.txt").write_text("another text altogether")
    same_samples(plain.samples(0, 500), cached.samples(0, 500))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_preparing_again_changes_nothing_and_says_so(tmp_path, folder):
    data = FilesData(path=str(folder))
    first, was_there = prepare(data, tmp_path / "out", shard_tokens=2000)
    assert not was_there
    before = content(tmp_path / "out")
    again, was_there = prepare(data, tmp_path / "out", shard_tokens=2000)
    assert was_there and again == first and content(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["text", "tokenizer", "shard_tokens", "column"])
def test_another_source_in_the_same_folder_is_refused(tmp_path, folder, change):
    data = FilesData(path=str(folder))
    prepare(data, tmp_path / "out", shard_tokens=2000)
    if change == "text":
        (folder / "00.txt").write_text("changed")
    other = data.choose_tokenizer(BPE(vocab_size=300)) if change == "tokenizer" else data
    other = FilesData(path=str(folder), column="TEXT") if change == "column" else other
    with pytest.raises(DataError, match=r"out was begun with another (source|tokenizer|shard_tokens): [^\n]*"):
        prepare(other, tmp_path / "out", shard_tokens=3000 if change == "shard_tokens" else 2000)


def test_a_folder_with_other_files_is_not_written_into(tmp_path, folder):
    with pytest.raises(DataError, match=r"texts holds other files such as 00.txt; name a new folder"):
        prepare(FilesData(path=str(folder)), folder)


def test_damage_is_found_and_named(tmp_path, folder):
    prepare(FilesData(path=str(folder)), tmp_path / "out", shard_tokens=2000)
    file = tmp_path / "out" / "shard-00001.tokens"
    tokens = bytearray(file.read_bytes())
    tokens[7] ^= 1
    file.write_bytes(tokens)
    with pytest.raises(DataError, match=r"shard-00001\.\* is damaged"):
        prepare(FilesData(path=str(folder)), tmp_path / "out", shard_tokens=2000)
    file.write_bytes(tokens[:-1])
    with pytest.raises(DataError, match=r"shard-00001.tokens has \d+ bytes, the manifest says \d+"):
        PreparedData(path=str(tmp_path / "out")).samples(0, 10)


@pytest.mark.parametrize("name", ["manifest.json", "source.json", "shard-00000.json", "shard-00000.npy"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe", b"{}", "no permission"], ids=str)
def test_a_damaged_file_of_a_prepared_folder_is_one_sentence(tmp_path, folder, monkeypatch, name, damage):
    data, out = FilesData(path=str(folder)), tmp_path / "out"
    prepare(data, out, shard_tokens=2000)
    if name.startswith("shard-00000.json"):
        (out / "manifest.json").unlink()
    if damage == "no permission":
        real = open

        def refusing(path, *arguments, **options):
            if str(path) == str(out / name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr("builtins.open", refusing), monkeypatch.setattr("io.open", refusing)
    else:
        (out / name).write_bytes(damage)
    with pytest.raises(DataError, match=rf"{name} (is damaged|cannot be read)[^\n]*$"):
        if name in ("source.json", "shard-00000.json"):
            prepare(data, out, shard_tokens=2000)
        else:
            PreparedData(path=str(out), context=65, val_fraction=0.3).samples(0, 10)


def test_an_unfinished_folder_and_a_wrong_one_are_told_apart(tmp_path, folder):
    prepare(FilesData(path=str(folder)), tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"is not finished; the command that began it continues it"):
        PreparedData(path=str(tmp_path / "out")).samples(0, 10)
    with pytest.raises(DataError, match=r"holds no prepared tokens"):
        PreparedData(path=str(folder)).samples(0, 10)
    with pytest.raises(ValueError, match=r"data.path is 'nowhere', which is no folder"):
        PreparedData(path="nowhere")


def test_another_format_is_refused(tmp_path, folder):
    prepare(FilesData(path=str(folder)), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(DataError, match=r"has format 99, this version reads 1"):
        PreparedData(path=str(tmp_path / "out")).samples(0, 10)


def test_a_single_document_holds_out_its_own_end(tmp_path):
    text = words(2000, 5)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    data = FilesData(path=str(tmp_path / "one.txt"), val_fraction=0.1, context=50)
    samples = data.samples(0, 10**9)
    kept = round(len(text) * 0.9)
    for stream, part in ((samples.train.stream, text[:kept]), (samples.val.stream, text[kept:])):
        assert stream[:].tobytes() == bytes([ByteTokenizer.bos]) + part.encode()
    prepare(data, tmp_path / "out", shard_tokens=1500)
    same_samples(samples, PreparedData(path=str(tmp_path / "out"), context=50).samples(0, 10**9))
    with pytest.raises(DataError, match="begun with another source"):
        prepare(FilesData(path=str(tmp_path / "one.txt"), val_fraction=0.2), tmp_path / "out", shard_tokens=1500)


def test_a_trained_tokenizer_never_sees_what_is_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("seen words " * 500 + "unseen" * 200)
    data = FilesData(path=str(tmp_path / "one.txt"), val_fraction=0.2).choose_tokenizer(BPE(vocab_size=400))
    assert len(data.build_tokenizer().encode("unseen unseen")) > 4 > len(data.build_tokenizer().encode("seen seen"))


def forked(data, folder, report):
    """The id of a child that prepares `data` and writes by how many KiB its peak memory grew to the file `report`."""
    child = os.fork()
    if child:
        return child
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepare(data, folder, shard_tokens=1 << 21)
        report.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    finally:
        os._exit(0)


@pytest.mark.multiprocess
def test_a_killed_process_is_continued_without_loss_in_constant_memory(tmp_path, monkeypatch):
    """One document of 24 MB without line breaks, killed twice."""
    monkeypatch.undo()  # pieces as they are
    text = words(20_000, 3).replace("\n", " ")
    (tmp_path / "large.txt").write_text(text * (24_000_000 // len(text.encode())), encoding="utf-8")
    data, grown = FilesData(path=str(tmp_path / "large.txt")), tmp_path / "grown"
    del text
    os.waitpid(forked(data, tmp_path / "one", grown), 0)
    assert int(grown.read_text()) < 20 * 1024
    for shards_before in (1, 4):
        child = forked(data, tmp_path / "killed", grown)
        while len(list((tmp_path / "killed").glob("shard*.json"))) < shards_before:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert 1 <= len(complete_shards(tmp_path / "killed")) < 12
    os.waitpid(forked(data, tmp_path / "killed", grown), 0)
    assert content(tmp_path / "killed") == content(tmp_path / "one")
    assert not list((tmp_path / "killed").glob(".*.partial"))


def test_a_text_file_is_read_byte_for_byte_wherever_its_blocks_end(tmp_path, monkeypatch):
    monkeypatch.setattr("lightsparse.data.documents.READ", 5)
    (tmp_path / "a").write_bytes("日本語🙂é\r\n\x00ab".encode())
    assert "".join(TextFile(tmp_path / "a")).encode() == (tmp_path / "a").read_bytes()
    (tmp_path / "latin").write_bytes(b"caf\xc3\xa9 au lait \xe9 x")
    with pytest.raises(DataError, match=r"latin is not UTF-8 text \(byte 14\)"):
        "".join(TextFile(tmp_path / "latin"))
    (tmp_path / "cut").write_bytes("é日".encode()[:-1])
    with pytest.raises(DataError, match=r"cut is not UTF-8 text \(byte 2\)"):
        "".join(TextFile(tmp_path / "cut"))
