"""A run keeps its tokenizer: resumed and opened again it reads text with the very same one."""

import json

import numpy as np
import pytest

from lightsparse.cli.work.show import of_run
from lightsparse.data.errors import DataError
from lightsparse.data.run_tokenizer import tokenizer_of
from lightsparse.data.subwords import TOKENIZER, train_bpe
from lightsparse.data.tokenizer import load_folder
from lightsparse.data.tokens import ByteTokenizer
from lightsparse.training.run import fit

BPE = ("tokenizer=bpe", "tokenizer.vocab_size=300")


def test_a_run_with_a_bpe_keeps_it_resumes_with_it_and_writes_text(tiny, tmp_path, caplog):
    caplog.set_level("INFO", logger="lightsparse.data")
    run = tmp_path / "runs" / "tiny"
    first = fit(tiny(*BPE, "trainer.max_steps=5"))
    kept = load_folder(run)
    assert kept.vocab_size == 300 and tokenizer_of(tiny(*BPE).data, run).fingerprint == kept.fingerprint
    assert caplog.text.count("trained a BPE") == 1
    second = fit(tiny(*BPE, "trainer.max_steps=8"))
    assert caplog.text.count("trained a BPE") == 1  # it was loaded
    assert (first["steps"], second["steps"]) == (5, 8)
    assert "Document" in (run / "sample.txt").read_text(encoding="utf-8")
    assert of_run(run, None)[0].endswith("step 8")


def test_bits_per_byte_of_an_untrained_model_are_those_of_its_bytes(tiny):
    """Equal odds over all ids cost log2(ids) bits a token, whatever the tokenizer: per byte they differ as bytes do."""
    by_bytes = fit(tiny("trainer.max_steps=1", "optimizer.lr=0", "name=a"))
    by_bpe = fit(tiny(*BPE, "trainer.max_steps=1", "optimizer.lr=0", "name=b"))
    assert by_bytes["val_bits_per_byte"] == pytest.approx(8, rel=0.05)
    data = tiny(*BPE).data
    samples = data.samples(0, 512)
    labels = np.concatenate([samples.val[i]["labels"].numpy() for i in range(len(samples.val))])
    labels = labels[labels >= 0]
    per_token = samples.tokenizer.token_bytes()[labels].sum().item() / len(labels)
    assert by_bpe["val_bits_per_byte"] == pytest.approx(np.log2(300) / per_token, rel=0.05)


def test_a_resumed_run_with_another_tokenizer_is_refused(tiny, tmp_path):
    fit(tiny(*BPE, "trainer.max_steps=5"))
    train_bpe(["another text " * 100], 300).save(tmp_path / "runs" / "tiny")
    with pytest.raises(DataError, match="data with fingerprint"):
        fit(tiny(*BPE, "trainer.max_steps=8"))


def test_what_a_given_up_run_left_is_not_taken_for_the_tokenizer_of_a_new_one(tiny, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    train_bpe(["another text " * 100], 300).save(run)
    fit(tiny("trainer.max_steps=2"))
    assert not (run / TOKENIZER).exists()
    assert tokenizer_of(tiny().data, run).fingerprint == ByteTokenizer.fingerprint


def test_the_objective_mlm_hides_behind_the_tokenizer_s_own_mask(tiny, tmp_path):
    fit(tiny(*BPE, "objective=mlm", "trainer.max_steps=2"))
    assert "▒" in (tmp_path / "runs" / "tiny" / "sample.txt").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "runs" / "tiny" / "tokenizer_config.json").read_text())["mask_token"] == "<|mask|>"
