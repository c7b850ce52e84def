import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lightsparse.attention.core import AttentionResult, AttentionShape
from lightsparse.attention.dense import DenseAttention
from lightsparse.bench import command, kernel_time, measure_variants, variant_check, variants
from lightsparse.bench.kernel_time import kernel_seconds
from lightsparse.bench.measure_variants import faster_than_dense, slower_than_dense
from lightsparse.bench.variant_check import equals_its_layout, equals_the_reference
from lightsparse.bench.verify import VerificationError

SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=16, embed_dim=64, context=1000)
SMALL = 111
TINY = ["kernels", "--seq", "1000", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--repeats", "1"]
PROMISED = {
    *("variant", "backend", "pass", "seq", "heads", "head_dim", "block", "density", "dtype", "threads"),
    *("ms", "dense_ms", "speedup", "cpu_speedup", "flop_ratio", "efficiency"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(variant_check, "SMALL", SMALL)


def choice(name):
    return variants.chosen([name])[name]


def measured(tmp_path, *words):
    file = tmp_path / "variants.json"
    assert command.main([*TINY, *words, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", variants.chosen(["all"]))
def test_every_variant_is_built_from_its_yaml_and_equals_the_reference(name):
    for dtype in (torch.float32, torch.bfloat16):
        assert equals_the_reference(name, choice(name), SHAPE, dtype) < 0.01


def test_rows_hold_each_variant_as_configured_and_at_the_densities_it_can_be_solved_for(tmp_path):
    report = measured(tmp_path, "--variants", "sliding_window,dense", "--density", "0.5", "--dtype", "fp32,bf16")
    rows = report["rows"]
    found = [(row["dtype"], row["variant"], row["asked"], row["density_nominal"]) for row in rows]
    per_dtype = [("sliding_window", "default", None), ("sliding_window", "0.5", 0.5), ("dense", "fixed", None)]
    assert found == [(dtype, *row) for dtype in ("fp32", "bf16") for row in per_dtype]
    for row in rows:
        assert row.keys() >= PROMISED and row["pass"] == "fwd+bwd" and row["rows_verified"]
        assert row["flop_ratio"] == pytest.approx(1 / row["density"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_ratio"])
    assert [row["density"] for row in rows[:3]] == [1.0, pytest.approx(0.45, abs=0.05), 1.0]
    notes = "\n".join(report["notes"])
    assert "dense refuses density 0.5 at 1,000 tokens" in notes and "no parameter to solve" in notes
    assert "multiplies bf16 inputs in" in notes


def test_without_a_listed_density_only_dense_defaults_are_asked_for_a_sparse_one(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_variants, "SPARSE", 0.5)
    words = ["--variants", "sliding_window", "dilated", "--dtype", "fp32"]
    rows = measured(tmp_path, *words, "--seq", "4000")["rows"]
    assert [(row["variant"], row["asked"]) for row in rows] == [("sliding_window", "default"), ("dilated", "default")]
    rows = measured(tmp_path, *words)["rows"]
    assert [(row["variant"], row["asked"]) for row in rows] == [
        ("sliding_window", "default"),
        ("sliding_window", "0.5"),
        ("dilated", "fixed"),
    ]


def test_what_learns_is_measured_with_its_router_and_its_auxiliary_loss():
    given = variants.layer_inputs(SHAPE, 1000, torch.float32)
    core = variants.build(choice("adaptive"), SHAPE)
    assert core.training
    found = variants.forward_backward(core, given)
    assert found["the gradient of router.query"].abs().max() > 0


@pytest.mark.parametrize("asked", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", ["big_bird", "sliding_window", "hierarchical"])
def test_a_solved_density_is_at_most_the_asked_one_and_near(name, asked):
    shape = replace(SHAPE, context=3000)
    given = variants.layer_inputs(shape, 3000, torch.float32)
    assert 0.8 * asked < variants.at_density(choice(name), asked, shape, given).density <= asked


@pytest.mark.parametrize(
    ("name", "asked", "sentence"),
    [("dense", 0.2, "no parameter"), ("dilated", 0.2, "none of them"), ("adaptive", 0.01, "it computes")],
)
def test_a_density_out_of_reach_is_refused_with_the_reason(name, asked, sentence):
    given = variants.layer_inputs(SHAPE, 1000, torch.float32)
    with pytest.raises(ValueError, match=sentence):
        variants.at_density(choice(name), asked, SHAPE, given)


WRONG = {
    "the output": lambda t: 1.01 * t,
    "the gradient of k": torch.zeros_like,
    "the gradient of router.theta": lambda t: None,
    "the gradient of v": lambda t: t * float("nan"),
}


@pytest.mark.parametrize("tensor", WRONG)
def test_a_variant_that_differs_from_the_reference_is_never_timed(monkeypatch, tmp_path, capsys, tensor):
    right, calls = variants.forward_backward, []

    def wrong_off_the_reference(core, given):
        found = right(core, given)
        calls.append(tensor)
        return found | {tensor: WRONG[tensor](found[tensor])} if len(calls) == 1 else found

    def never(*_):
        raise AssertionError("timed a wrong variant")

    monkeypatch.setattr(variants, "forward_backward", wrong_off_the_reference)
    monkeypatch.setattr(measure_variants, "alternate", never)
    assert command.main([*TINY, "--variants", "adaptive", "--dtype", "fp32"]) == 1
    assert tensor in capsys.readouterr().err


def test_a_variant_that_reads_more_than_its_layout_is_caught():
    shape = replace(SHAPE, context=3000)
    given = variants.layer_inputs(shape, 3000, torch.float32)
    core = variants.build(choice("sliding_window"), shape)
    assert equals_its_layout("it", core, given) < 1e-5

    def reads_everything(q, k, v, *, x, ctx):
        return AttentionResult(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    core.forward = reads_everything
    with pytest.raises(VerificationError, match="it, 3000 tokens"):
        equals_its_layout("it", core, given)


@pytest.mark.parametrize("name", ["adaptive", "dilated", "hierarchical"])
def test_without_a_layout_of_the_tokens_alone_no_rows_are_compared(name):
    given = variants.layer_inputs(SHAPE, 1000, torch.float32)
    assert equals_its_layout(name, variants.build(choice(name), SHAPE), given) is None


def test_a_variant_that_cannot_take_the_shape_is_left_out_with_its_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(DenseAttention, "supports_gqa", False)
    report = measured(tmp_path, "--variants", "dense,big_bird", "--dtype", "fp32", "--density", "0.9")
    assert {row["variant"] for row in report["rows"]} == {"big_bird"}
    assert "dense is left out at 1,000 tokens: " in " ".join(report["notes"])
    assert command.main([*TINY, "--variants", "dense"]) == 2
    assert "as many key/value heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--variants", "windo"], "choose all, learned, or any of adaptive, big_bird"),
        (["--variants", "all", "--block", "64"], "--block is given with --variants"),
        (["--variants", "all", "--pattern", "mixed"], "--pattern is given with --variants"),
        (["--variants", "all", "--density", "1.5"], "--density is 1.5"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(words, sentence, capsys):
    assert command.main([*TINY, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_who_loses_to_dense_although_sparse_is_said_with_the_length_from_which_it_wins():
    def row(variant, seq, density, speedup):
        return {"variant": variant, "asked": "default", "dtype": "fp32", "seq": seq, "density": density} | {
            "speedup": speedup
        }

    rows = [row("wins", 1024, 0.2, 1.1), row("dense", 1024, 1.0, 0.9)]
    assert slower_than_dense(rows) == []
    rows += [row("late", 2048, 0.1, 0.9), row("late", 1024, 0.2, 0.5), row("late", 4096, 0.05, 1.2)]
    rows += [row("never", 1024, 0.1, 1.2), row("never", 4096, 0.1, 0.9)]
    assert slower_than_dense(rows) == [
        "late (default, fp32) is slower than dense at 1,024 tokens (0.5×), 2,048 tokens (0.9×); it wins from 4,096 "
        "tokens on.",
        "never (default, fp32) is slower than dense at 4,096 tokens (0.9×); it wins at no longer length measured here.",
    ]


def test_learned_stands_for_every_variant_that_chooses_from_its_input():
    everything = variants.chosen(["all"])
    assert list(variants.chosen(["learned"])) == [name for name, of in everything.items() if of.core.selects_from_input]
    assert list(variants.chosen(["learned", "dense"])) == [
        name for name, of in everything.items() if of.core.selects_from_input or name == "dense"
    ]


def test_what_chooses_has_the_time_of_its_choice_and_of_its_attention_apart(tmp_path):
    report = measured(tmp_path, "--variants", "moba,sliding_window", "--dtype", "fp32")
    rows = {row["variant"]: row for row in report["rows"]}
    assert "select_ms" not in rows["sliding_window"] and "attend_ms" not in rows["sliding_window"]
    moba = rows["moba"]
    assert moba["attend_ms"] > 0 and moba["select_ms"] + moba["attend_ms"] == pytest.approx(moba["ms"])
    notes = "\n".join(report["notes"])
    assert "attend_ms is the time inside the attention kernels" in notes
    assert "moba (as configured, fp32) beats dense " in notes and "sliding_window (as configured" not in notes


def test_columns_of_parts_are_shown_only_where_a_row_has_them(tmp_path, capsys):
    measured(tmp_path, "--variants", "sliding_window", "--dtype", "fp32")
    assert "select" not in capsys.readouterr().out
    measured(tmp_path, "--variants", "moba", "--dtype", "fp32")
    shown = capsys.readouterr().out
    assert "select" in shown and "attend" in shown


def test_time_in_kernels_is_that_of_their_operators_and_of_nothing_else(monkeypatch):
    given = variants.layer_inputs(SHAPE, 1000, torch.float32)
    core = variants.build(choice("moba"), SHAPE)
    clock = iter(range(100))
    monkeypatch.setattr(kernel_time.time, "perf_counter", lambda: float(next(clock)))
    assert kernel_seconds(lambda: variants.forward_backward(core, given)) == 2  # one forward, one backward
    assert kernel_seconds(lambda: F.scaled_dot_product_attention(given.q, given.q, given.q)) == 1
    assert kernel_seconds(lambda: given.q @ given.q.mT) == 0


def test_the_length_from_which_a_learned_variant_wins_is_said_for_the_whole_and_for_its_attention():
    def row(variant, seq, ms, attend_ms, asked="default"):
        return {"variant": variant, "asked": asked, "dtype": "fp32", "seq": seq, "dense_ms": 10.0} | {
            "ms": ms,
            "attend_ms": attend_ms,
        }

    rows = [row("late", 1024, 12.0, 8.0, "fixed"), row("late", 2048, 9.0, 5.0), row("never", 1024, 9.0, 12.0)]
    rows += [row("never", 2048, 11.0, 9.0), row("never", 2048, 8.0, 8.0, "0.2")]
    assert faster_than_dense(rows) == [
        "late (as configured, fp32) beats dense from 2,048 tokens on; its attention alone from 1,024 tokens on.",
        "never (as configured, fp32) beats dense at none up to 2,048 tokens; its attention alone from 2,048 tokens on.",
        "never (density 0.2, fp32) beats dense from 2,048 tokens on; its attention alone from 2,048 tokens on.",
    ]
