import json
from dataclasses import replace

import pytest
import torch

from lightsparse.bench import command, contenders, train
from lightsparse.bench.contenders import NAMES, Contender, Setup

SETUP = Setup(
    context=128, density=0.6, block=16, dtype="fp32", optimizer="adamw", threads=1, matmul_precision="highest"
)
TINY = ["train", "--context", "128", "--density", "0.6", "--block", "16", "--threads", "1", "--repeats", "2"]


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(train, "in_child", lambda function, *args: function(*args))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_leaves_a_row_per_model(in_this_process, tmp_path, dtype):
    file = tmp_path / "train.json"
    assert command.main([*TINY, "--dtype", dtype, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert tuple(row["model"] for row in rows) == NAMES
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(128_000 / row["ms_per_step"])
        assert row["peak_rss_mib"] > 100 and row["vs_transformers"] > 0
    assert 0 < rows[0]["density"] <= 0.6 and rows[1]["density"] == rows[2]["density"] == 1.0


def test_all_models_start_from_the_same_weights_and_tokens():
    ours, llama = Contender("lightsparse-dense", SETUP), Contender("transformers", SETUP)
    assert float(ours.loss()) == pytest.approx(float(llama.loss()), rel=1e-5)
    assert torch.equal(ours.tokens, llama.tokens)
    assert sum(p.numel() for p in ours.model.parameters()) == sum(p.numel() for p in llama.model.parameters())


@pytest.mark.parametrize("optimizer", contenders.OPTIMIZERS)
def test_dense_and_transformers_agree_after_a_step(optimizer):
    setup = Setup(**{**SETUP.__dict__, "optimizer": optimizer})
    losses = []
    for name in ("lightsparse-dense", "transformers"):
        contender = Contender(name, setup)
        contender.step()
        losses.append(float(contender.loss()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < float(Contender("lightsparse-dense", setup).loss())


def test_differing_dense_models_are_refused():
    train._verify({"lightsparse-dense": 5.0, "transformers": 5.0001}, "fp32")
    with pytest.raises(train.VerificationError, match="differ"):
        train._verify({"lightsparse-dense": 5.0, "transformers": 5.01}, "fp32")


def test_without_transformers_ours_is_measured_alone(in_this_process, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "installed", lambda: NAMES[:2])
    file = tmp_path / "train.json"
    assert command.main([*TINY, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [row["model"] for row in report["rows"]] == list(NAMES[:2])
    assert "transformers is not installed" in " ".join(report["notes"])


def test_models_that_do_not_fit_together_run_one_after_the_other(in_this_process, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "SPARE_MEMORY", 0.0)
    file = tmp_path / "train.json"
    assert command.main([*TINY, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert not any(row["alternated"] for row in report["rows"])
    assert "one after the other" in " ".join(report["notes"])


ONCE = [*TINY[:-1], "1"]


def test_one_repeat_measures_the_first_step_of_each_model(in_this_process, tmp_path):
    file = tmp_path / "train.json"
    words = [
        "--depth",
        "2",
        "--embed-dim",
        "64",
        "--heads",
        "1",
        "--kv-heads",
        "1",
        "--mlp-dim",
        "96",
        "--text",
        "stdlib",
    ]
    assert command.main([*ONCE, *words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["depth"] for row in rows] == [2] * 3 and len({row["parameters"] for row in rows}) == 1
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=0.01)
    assert 0 < rows[0]["layout_share"] < 1 and rows[1]["layout_share"] is rows[2]["layout_share"] is None


def test_the_same_window_is_the_same_pattern_at_every_context(in_this_process, tmp_path):
    file = tmp_path / "train.json"
    words = ["--context", "128,256", "--window", "32", "--models", "lightsparse", "--recompute"]
    assert command.main([*ONCE, *words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["context"], row["window"], row["recompute"]) for row in rows] == [(128, 32, True), (256, 32, True)]
    assert rows[1]["density"] < 0.6 * rows[0]["density"] and rows[0]["vs_transformers"] is None


def test_recomputing_changes_no_loss():
    kept, recomputed = (Contender("lightsparse", replace(SETUP, recompute=on)) for on in (False, True))
    assert [kept.step(), kept.step()] == pytest.approx([recomputed.step(), recomputed.step()], rel=1e-5)


def test_documents_have_other_borders_in_every_step_and_one_layout_for_all_layers():
    contender = Contender("lightsparse", replace(SETUP, documents=40))
    first, second = contender._documents(), contender._documents()
    assert not torch.equal(first, second) and int(first[0, -1]) >= 1 and bool((first.diff() >= 0).all())
    contender.step()
    assert contender.layout_seconds > 0


def test_documents_are_refused_beside_a_model_that_reads_across_them(capsys):
    assert command.main([*ONCE, "--documents", "50"]) == 2
    assert "--models lightsparse" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="use random"):
        contenders.tokens("stdlib", 1 << 30)
