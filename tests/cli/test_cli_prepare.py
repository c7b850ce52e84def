"""The command: what it says, that it continues and repeats nothing, that training reads what it wrote."""

import pytest

from lightsparse.cli.prepare import main
from lightsparse.config.parse import compose


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i} times is " * (10 + i))
    return tmp_path / "texts"


def test_the_command_says_what_it_made_and_how_to_train_on_it(texts, tmp_path, capsys):
    words = ["data=files", f"data.path={texts}", "tokenizer=bpe", "tokenizer.vocab_size=300", f"out={tmp_path / 'out'}"]
    assert main(words) == 0
    made, hint = capsys.readouterr().out.splitlines()
    assert "prepared in" in made and "40 documents" in made and "(bpe-" in made and "in 1 shards" in made
    assert main([*words, "data.context=77"]) == 0  # what only matters to the reader changes nothing
    assert "is complete and intact" in capsys.readouterr().out
    overrides = hint.partition("python train.py ")[2].split()
    data = compose([*overrides, "data.context=64", "data.val_fraction=0.2"]).data
    assert data.vocab_size == 300 and len(data.samples(0, 100).train) > 10


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "out is missing; write lightsparse prepare data=files"),
        (["out=x", "shard_tokens=0"], "shard_tokens is 0; it counts tokens and must be at least 1"),
        (["out=x", "shard_tokens=many"], "shard_tokens is 'many'"),
        (["out=x", "data=nope"], "data is nope; conf/data has"),
        (
            ["out=x", "data=mixture", "+data@data.sources.a=stdlib", "+data.weights={a: 1}"],
            "which is no text to be prepared",
        ),
        (
            ["out=x", "data=files", f"data.path={__file__}", "tokenizer=own"],
            "tokenizer is own, but FilesData brings none",
        ),
        (["out=x", "data=hub", "data.name=a/b"], "the hub is not reachable for data set 'a/b'"),
    ],
)
def test_what_cannot_be_prepared_is_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_data_that_brings_its_tokens_refuses_a_tokenizer(texts, tmp_path):
    assert main(["data=files", f"data.path={texts}", f"out={tmp_path / 'out'}"]) == 0
    with pytest.raises(ValueError, match=r"tokenizer is BPE, but PreparedData brings its own; leave it out"):
        compose(["data=prepared", f"data.path={tmp_path / 'out'}", "tokenizer=bpe"])
