import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lightsparse.models.rope import RopeConfig, RotaryEmbedding


def llama(head_dim: int, base: float, context: int = 64, **rope) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": base} | rope,
    )


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_plain_frequencies_are_those_of_transformers(head_dim, base):
    theirs, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(llama(head_dim, base, rope_type="default"))
    frequencies, scale = RopeConfig(base=base).frequencies(head_dim)
    torch.testing.assert_close(frequencies, theirs, rtol=1e-6, atol=0)
    assert scale == 1.0


@pytest.mark.parametrize("factor", [1.0, 2.5, 8.0])
def test_linear_frequencies_are_those_of_transformers(factor):
    theirs, _ = ROPE_INIT_FUNCTIONS["linear"](llama(64, 10_000.0, rope_type="linear", factor=factor))
    ours, scale = RopeConfig(scaling="linear", factor=factor).frequencies(64)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert scale == 1.0


@pytest.mark.parametrize(("their_factor", "length"), [(2.0, 256), (4.0, 100), (1.0, 640)])
def test_ntk_frequencies_are_those_transformers_reaches_at_a_length(their_factor, length):
    trained = 64
    config = llama(64, 10_000.0, context=trained, rope_type="dynamic", factor=their_factor)
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
    factor = their_factor * length / trained - (their_factor - 1)
    ours, scale = RopeConfig(scaling="ntk", factor=factor).frequencies(64)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert scale == 1.0


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize(
    "fields",
    [
        {"factor": 4.0, "original_context": 2048},
        {"factor": 32.0, "original_context": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
        {"factor": 8.0, "original_context": 8, "attention_factor": 0.7},
        {"factor": 1.0, "original_context": 512},
    ],
)
def test_yarn_frequencies_and_scale_are_those_of_transformers(head_dim, fields):
    theirs = dict(fields)
    theirs["original_max_position_embeddings"] = theirs.pop("original_context")
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](llama(head_dim, 10_000.0, rope_type="yarn", **theirs))
    frequencies, scale = RopeConfig(scaling="yarn", **fields).frequencies(head_dim)
    torch.testing.assert_close(frequencies, expected, rtol=1e-5, atol=1e-9)
    assert scale == pytest.approx(expected_scale)


def test_rotation_is_the_half_rotation_of_llama():
    head_dim, positions = 16, torch.tensor([[0, 1, 2, 50], [7, 3, 1000, 12]])
    q_BNHD = torch.randn(2, 4, 3, head_dim)
    cos, sin = LlamaRotaryEmbedding(llama(head_dim, 10_000.0, rope_type="default"))(q_BNHD, positions)
    expected, _ = apply_rotary_pos_emb(q_BNHD, q_BNHD, cos, sin, unsqueeze_dim=2)
    rotated = RotaryEmbedding(RopeConfig(), head_dim)(positions).apply(q_BNHD)
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 32, dtype=torch.float64), torch.randn(1, 1, 1, 32, dtype=torch.float64)
    rotary = RotaryEmbedding(RopeConfig(), 32)

    def score(i: int, j: int) -> float:
        return float((rotary(torch.tensor([[i]])).apply(q) * rotary(torch.tensor([[j]])).apply(k)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


@pytest.mark.parametrize("width", [32, 16, 64])
def test_vectors_of_any_width_are_turned_like_heads_of_that_width(width):
    config, positions = RopeConfig(scaling="linear", factor=2.0), torch.tensor([[0, 5, 1000]])
    x_BHNW = torch.randn(2, 4, 3, width)
    expected = RotaryEmbedding(config, width)(positions).apply(x_BHNW.transpose(1, 2)).transpose(1, 2)
    assert torch.equal(RotaryEmbedding(config, 32).rotated(x_BHNW, positions), expected)


def test_rotation_of_bf16_is_computed_in_fp32_and_returned_in_bf16():
    positions = torch.arange(3000, 3008)[None]
    q = torch.randn(1, 8, 2, 64).bfloat16()
    rotation = RotaryEmbedding(RopeConfig(), 64)(positions)
    assert rotation.cos.dtype == torch.float32
    assert torch.equal(rotation.apply(q), rotation.apply(q.float()).bfloat16())


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("bounds", [(1.0, 4.0), (2.0, 3.5)])
def test_llama3_frequencies_are_those_of_transformers(head_dim, bounds):
    low, high = bounds
    theirs = {"factor": 8.0, "original_max_position_embeddings": 512, "low_freq_factor": low, "high_freq_factor": high}
    expected, expected_scale = ROPE_INIT_FUNCTIONS["llama3"](llama(head_dim, 5e5, rope_type="llama3", **theirs))
    rope = RopeConfig(
        base=5e5, scaling="llama3", factor=8.0, original_context=512, low_freq_factor=low, high_freq_factor=high
    )
    frequencies, scale = rope.frequencies(head_dim)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scale == expected_scale
    plain = RopeConfig(base=5e5).frequencies(head_dim)[0]
    between = (frequencies != plain) & (frequencies != plain / 8)
    assert between.any() and (frequencies == plain).any() and not between.all()  # all three bands occur


def test_yarn_lengthens_slow_turns_and_keeps_fast_ones():
    plain, _ = RopeConfig().frequencies(64)
    yarn, scale = RopeConfig(scaling="yarn", factor=16.0, original_context=4096).frequencies(64)
    assert yarn[0] == plain[0]
    assert yarn[-1] == pytest.approx(float(plain[-1]) / 16)
    assert scale == pytest.approx(0.1 * math.log(16) + 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scaling": "cubic"}, "none, linear, ntk, yarn or llama3"),
        ({"base": 1.0}, "must exceed 1"),
        ({"scaling": "linear", "factor": 0.5}, "at least 1"),
        ({"factor": 2.0}, "choose linear, ntk, yarn or llama3"),
        ({"scaling": "yarn", "factor": 2.0}, "yarn needs the tokens of context"),
        ({"scaling": "yarn", "original_context": 64, "beta_fast": 1.0}, "beta_fast > beta_slow"),
        ({"scaling": "yarn", "original_context": 64, "attention_factor": 0.0}, "above 0"),
        ({"scaling": "ntk", "factor": 2.0, "original_context": 64}, "for yarn and llama3, but"),
        ({"scaling": "llama3", "factor": 2.0}, "llama3 needs the tokens of context"),
        ({"scaling": "llama3", "original_context": 64, "high_freq_factor": 1.0}, "high_freq_factor > low_freq_factor"),
        ({"scaling": "llama3", "original_context": 64, "beta_fast": 16.0}, "for yarn, but"),
        ({"scaling": "yarn", "original_context": 64, "low_freq_factor": 2.0}, "for llama3, but"),
        ({"scaling": "linear", "factor": 2.0, "attention_factor": 1.0}, "for yarn, but"),
    ],
)
def test_a_setting_without_meaning_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        RopeConfig(**fields)
