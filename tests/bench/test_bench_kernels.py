import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from lightsparse.bench import against_dense, command, kernels
from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import LocalWindow

TINY = ["kernels", "--seq", "96,130", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--block", "16"]
TINY += ["--density", "0.4", "--repeats", "2", "--backends", "native,blocked"]
PROMISED = {
    *("backend", "pass", "seq", "heads", "head_dim", "block", "density", "dtype", "threads"),
    *("ms", "dense_ms", "dense_kernel", "speedup", "flop_ratio", "efficiency"),
}


def test_a_run_leaves_rows_with_all_promised_keys_and_its_circumstances(tmp_path, capsys):
    file = tmp_path / "made" / "kernels.json"
    assert command.main([*TINY, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert len(report["rows"]) == 2 * 2 * 2 * 2  # dtypes, lengths, passes, backends
    for row in report["rows"]:
        assert row.keys() >= PROMISED
        assert 0.4 <= row["density"] <= 0.5
        assert row["flop_ratio"] == pytest.approx(1 / row["density"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"])
        assert row["ms"] > 0 and row["dense_ms"] > 0
    assert {row["dense_kernel"] for row in report["rows"]} == {"flash"}
    assert {row["pass"] for row in report["rows"]} == {"fwd", "fwd+bwd"}
    assert {row["dtype"] for row in report["rows"]} == {"fp32", "bf16"}
    assert {row["backend"] for row in report["rows"]} == {"native", "blocked"}
    assert report["hardware"]["cores"] >= 1 and report["versions"]["torch"]
    assert report["command"].startswith("lightsparse bench kernels --seq 96,130")
    assert "efficiency" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("taken", "in_place", "device", "name"),
    [
        (SDPBackend.FLASH_ATTENTION, None, "cuda", "flash"),
        (SDPBackend.FLASH_ATTENTION, "FA3", "cuda", "FA3"),
        (SDPBackend.FLASH_ATTENTION, "FA4", "cpu", "flash"),
        (SDPBackend.CUDNN_ATTENTION, "FA4", "cuda", "cuDNN"),
        (SDPBackend.EFFICIENT_ATTENTION, None, "cuda", "efficient"),
        (SDPBackend.MATH, None, "cuda", "math"),
    ],
)
def test_the_yardstick_names_the_kernel_that_dense_attention_takes(taken, in_place, device, name, monkeypatch):
    monkeypatch.setattr(against_dense, "fused_attention_kernel", lambda *_, **__: taken)
    monkeypatch.setattr(against_dense, "current_flash_attention_impl", lambda: in_place)
    q = SimpleNamespace(shape=(1, 2, 8, 16), device=torch.device(device))
    assert against_dense.dense_kernel(q, q, q) == name


def test_a_wrong_kernel_ends_the_run_before_anything_is_timed(monkeypatch, tmp_path, capsys):
    def ignores_the_layout(layout, backend):
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def never(*_):
        raise AssertionError("timed a wrong kernel")

    monkeypatch.setattr(kernels, "ours", ignores_the_layout)
    monkeypatch.setattr(kernels, "alternate", never)
    assert command.main([*TINY, "--json", str(tmp_path / "x.json")]) == 1
    assert "is wrong" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("words", [["--heads", "4", "--kv-heads", "3"], ["--density", "1.5"]])
def test_options_that_cannot_be_are_one_sentence(words, capsys):
    assert command.main([*TINY, *words]) == 2
    assert "must" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--dtype", "fp8"], ["--seq", "0"], ["--seq", "many"], ["--pattern", "round"]])
def test_values_outside_an_option_are_refused(words):
    with pytest.raises(SystemExit):
        command.main([*TINY, *words])


def test_lists_take_commas_and_spaces():
    both = [
        command._parser(["kernels"]).parse_args(["kernels", "--seq", *words]).seq
        for words in (["64,128"], ["64", "128"])
    ]
    assert both == [[64, 128], [64, 128]]


@pytest.mark.slow
def test_compiled_flex_attention_is_verified_and_timed_beside_ours(tmp_path):
    file = tmp_path / "flex.json"
    words = ["kernels", "--seq", "512", "--block", "64", "--density", "0.4", "--dtype", "fp32", "--repeats", "1"]
    assert command.main([*words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["backend"], row["pass"]) for row in rows] == [
        ("native", "fwd"),
        ("blocked", "fwd"),
        ("flex", "fwd"),
        ("native", "fwd+bwd"),
        ("blocked", "fwd+bwd"),
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "cuda"], "--device is cuda, and PyTorch finds no CUDA device here; leave it out"),
        (["--device", "cuda", "--variants", "all"], "--device is cuda and --variants measures on the CPU only"),
    ],
)
def test_a_device_that_is_not_there_or_not_measured_is_refused_in_a_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["kernels", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_dense_yardstick_is_causal_and_serves_grouped_queries():
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    layout = LocalWindow(12).layout(12, block=4)
    torch.testing.assert_close(
        against_dense.dense(q, k, v), block_sparse_attention(q, k, v, layout, backend="reference")
    )
