import json

import pytest

from lightsparse.bench import command, data


@pytest.fixture
def text(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"document {i} says this and that. " * 40)
    return f"{tmp_path}/*.txt"


def run(text, tmp_path, monkeypatch, *words):
    monkeypatch.setattr(data, "_step_seconds", lambda args: 2.0)
    file = tmp_path / "data.json"
    tiny = ["--context", "64", "--val-fraction", "0.5", "--batches", "3", "--repeats", "1", "--vocab-size", "300"]
    assert command.main(["data", "--path", text, *tiny, "--json", str(file), *words]) == 0
    return json.loads(file.read_text())["rows"]


def test_every_piece_of_work_has_a_row(text, tmp_path, monkeypatch):
    rows = run(text, tmp_path, monkeypatch)
    of = {(row["tokenizer"], row["work"], row["packing"]) for row in rows}
    common = {("tokenize", None), *((work, packing) for work in ("pack", "load") for packing in data.PACKINGS)}
    own = {("bytes", "read", None), ("bpe", "train the tokenizer", None)}
    assert of == own | {(name, *rest) for name in data.TOKENIZERS for rest in common} and len(rows) == len(of)
    assert all(row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"]) for row in rows)


def test_tokens_are_counted_and_the_share_is_of_a_sample(text, tmp_path, monkeypatch):
    rows = {(row["work"], row["packing"]): row for row in run(text, tmp_path, monkeypatch, "--tokenizer", "bytes")}
    size = 6 * 40 * len("document 0 says this and that. ")
    assert rows["read", None]["tokens"] == size and rows["tokenize", None]["tokens"] == size + 6  # a bos each
    load, pack = rows["load", "concat"], rows["pack", "isolate"]
    assert load["tokens"] == 3 * 64 and load["share_of_step"] == pytest.approx(load["seconds"] / 3 / 2.0)
    assert pack["share_of_step"] == pytest.approx(pack["seconds"] / (pack["tokens"] / 64) / 2.0)
    assert rows["read", None]["share_of_step"] is None


def test_a_text_that_is_too_short_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("short")
    monkeypatch.setattr(data, "_step_seconds", lambda args: 2.0)
    assert command.main(["data", "--path", str(tmp_path / "a.txt")]) == 2
    assert "fewer than one sample" in capsys.readouterr().err
